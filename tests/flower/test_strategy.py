"""C2M3 around Flower's strategies: no harm, the gain, and the form of what comes out."""

from __future__ import annotations

import logging
import random
import re
from copy import deepcopy

import pytest
import torch
from flwr.app import MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian

from c2m3_fl.flower.incoming.records import from_params, schema_of, to_params
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import (
    EXAMPLE,
    accuracy,
    calibration,
    clients,
    digits,
    digits_app,
    mlp,
    normed,
    reply,
    same,
    send,
    shuffled,
)


def one_round(strategy, *, independent=True, nodes=5, epochs=15):
    grid = SerialGrid(digits_app(independent=independent, epochs=epochs), nodes)
    result = strategy.start(grid, from_params(mlp().state_dict()), num_rounds=1)
    return accuracy(mlp, result.arrays), result.train_metrics_clientapp[1]


def test_from_independent_starts_the_average_is_a_model_instead_of_noise():
    plain, _ = one_round(FedAvg(fraction_evaluate=0.0))
    ours, metrics = one_round(C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE))
    assert plain < 0.5
    assert ours > 0.85
    assert metrics["c2m3-objective-after"] > metrics["c2m3-objective-before"]
    assert metrics["c2m3-share-moved"] > 0.5


def test_calibration_data_are_used_and_counted():
    strategy = C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), calibration=calibration())
    repaired, metrics = one_round(strategy)
    assert repaired > 0.85
    assert metrics["c2m3-repaired"] == 1


@pytest.mark.parametrize("chosen", ["repair", "none"])
def test_without_repair_calibration_data_change_nothing(chosen):
    strategy = C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), calibration=calibration(), recalibrate=chosen)
    _, metrics = one_round(strategy, epochs=1)
    assert ("c2m3-repaired" in metrics) == (chosen == "repair")


@pytest.mark.parametrize("labelled", [False, True])
def test_what_the_guard_decides_and_why_is_in_the_metrics_and_the_log(labelled, caplog):
    data, labels = digits()
    batch = (data[:300], labels[:300]) if labelled else data[:300]
    strategy = C2M3(
        FedAvg(fraction_evaluate=0.0), model=mlp(), calibration=[batch], recalibrate="auto", diagnostics=True
    )
    repaired, metrics = one_round(strategy)
    kept = {key.rsplit("/", 1)[1]: value for key, value in metrics.items() if key.startswith("c2m3-guard-kept/")}
    assert sum(kept.values()) == 1
    assert set(kept) >= ({"none", "repair", "refit"} if labelled else {"repair"})
    assert any("the guard keeps" in text for text in caplog.messages)
    assert repaired > 0.85
    if labelled:
        (chosen,) = (name for name, flag in kept.items() if flag)
        accuracies = {name: metrics[f"c2m3-guard-accuracy/{name}"] for name in kept}
        (told,) = (text for text in caplog.messages if "the guard keeps" in text)
        found = re.search(
            r"classifies ([\d.]+)% of the 60 labelled .* left out of its fit correctly, "
            r"(?:'(\w+)'|the aggregate) ([\d.]+)%",
            told,
        )
        assert found is not None
        refit, rival, held_out = float(found[1]), found[2] or "none", float(found[3])
        assert accuracies["refit"] == pytest.approx(refit / 100, abs=6e-4), "on the inputs that its fit left out"
        assert accuracies[rival] == max(value for name, value in accuracies.items() if name != "refit")
        assert chosen == ("refit" if refit > held_out else rival)


def test_the_global_model_does_not_depend_on_the_order_of_the_replies():
    found = []
    for seed in range(3):
        strategy = C2M3(model=mlp(), calibration=calibration())
        send(strategy, mlp().state_dict())
        replies = [reply(node, params, examples=10 + node) for node, params in enumerate(clients(5))]
        random.Random(seed).shuffle(replies)
        found.append(strategy.aggregate_train(1, replies)[0])
    assert all(same(found[0], other) for other in found[1:])


def test_shuffled_copies_of_the_sent_model_come_home():
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE)
    (model,) = clients(1)
    send(strategy, model)
    replies = [reply(node, shuffled(strategy.setup.spec, model, seed=node)) for node in range(4)]
    arrays, _ = strategy.aggregate_train(1, replies)
    for name, value in to_params(arrays).items():
        torch.testing.assert_close(value, model[name])


def test_rounds_end_in_the_basis_of_the_model_that_was_sent():
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE)
    spec = strategy.setup.spec
    sent, *others = clients(5)
    send(strategy, sent)
    moved = [shuffled(spec, params, seed) for seed, params in enumerate(others)]
    replies = [reply(node, params) for node, params in enumerate([shuffled(spec, sent, 9), *moved])]
    first, _ = strategy.aggregate_train(1, replies)
    again, metrics = strategy.aggregate_train(2, [reply(0, sent), reply(1, to_params(first))])
    assert metrics["c2m3-share-moved"] == 0, "the merge and the model that was sent are in one basis"
    assert again is not None


def test_counters_take_the_largest_reply_and_keep_their_dtype_and_place():
    strategy = C2M3(model=normed(), example_inputs=EXAMPLE)
    sent = normed().state_dict()
    send(strategy, sent)
    replies = [reply(node, {**sent, "1.num_batches_tracked": torch.tensor(count)}) for node, count in enumerate([3, 8])]
    arrays, _ = strategy.aggregate_train(1, replies)
    back = to_params(arrays)
    assert list(back) == list(sent)
    assert schema_of(arrays) == schema_of(from_params(sent))
    assert back["1.num_batches_tracked"] == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_element_types_are_kept(dtype):
    model = mlp().to(dtype)
    strategy = C2M3(model=model, example_inputs=EXAMPLE.to(dtype))
    send(strategy, model.state_dict())
    arrays, _ = strategy.aggregate_train(1, [reply(node, mlp(node).to(dtype).state_dict()) for node in range(2)])
    assert {array.dtype for array in arrays.values()} == {str(dtype).removeprefix("torch.")}


@pytest.mark.parametrize("calibrated", [False, True])
def test_what_a_strategy_returns_in_float64_is_repaired_in_the_models_own_type(calibrated):
    strategy = C2M3(FedAdam(), model=mlp(), example_inputs=EXAMPLE, calibration=calibration() if calibrated else None)
    send(strategy, mlp().state_dict())
    arrays, _ = strategy.aggregate_train(1, [reply(node, params) for node, params in enumerate(clients(3))])
    assert {array.dtype for array in arrays.values()} == {"float32" if calibrated else "float64"}


@pytest.mark.parametrize("basis", ["global", "client"])
def test_clients_may_reply_in_the_type_that_they_were_sent_or_in_the_models_own(basis):
    strategy = C2M3(FedAdam(eta=0.01), model=mlp(), example_inputs=EXAMPLE, basis=basis)
    sent = {name: value.double() for name, value in mlp().state_dict().items()}
    messages = send(strategy, sent)
    assert {array.dtype for each in messages for array in each.content["arrays"].values()} == {"float64"}
    replies = [reply(1, clients(2)[0]), reply(2, {name: value.double() for name, value in clients(2)[1].items()})]
    narrow = reply(3, {name: value.half() for name, value in clients(2)[1].items()})
    arrays, metrics = strategy.aggregate_train(1, [*replies, narrow])
    assert (metrics["c2m3-replies"], metrics["c2m3-cast"], metrics["c2m3-share-moved"] > 0.5) == (3, 1, True)
    again = {array.dtype for each in send(strategy, to_params(arrays)) for array in each.content["arrays"].values()}
    assert again == {"float64"}


def test_key_order_is_that_of_the_model_whatever_order_a_client_sends():
    strategy = C2M3(FedAvgM(server_momentum=0.5), model=mlp(), example_inputs=EXAMPLE)
    sent = mlp().state_dict()
    send(strategy, sent)
    params = clients(2)
    straight, _ = strategy.aggregate_train(1, [reply(node, each) for node, each in enumerate(params)])
    other = C2M3(FedAvgM(server_momentum=0.5), model=mlp(), example_inputs=EXAMPLE)
    send(other, sent)
    backwards = [dict(reversed(each.items())) for each in params]
    turned, _ = other.aggregate_train(1, [reply(node, each) for node, each in enumerate(backwards)])
    assert same(straight, turned)


def test_the_replies_themselves_are_left_alone():
    strategy = C2M3(FedMedian(), model=mlp(), example_inputs=EXAMPLE)  # which empties the records that it is given
    send(strategy, mlp().state_dict())
    replies = [reply(node, params) for node, params in enumerate(clients(3))]
    before = deepcopy([each.content for each in replies])
    strategy.aggregate_train(1, replies)
    for message, content in zip(replies, before, strict=True):
        assert same(message.content["arrays"], content["arrays"])
        assert message.content["metrics"] == content["metrics"]


def test_weights_are_those_of_the_wrapped_strategys_key():
    strategy = C2M3(FedAvg(weighted_by_key="minutes"), model=mlp(), example_inputs=EXAMPLE)
    send(strategy, mlp().state_dict())
    light, heavy = clients(2, independent=False)
    messages = [
        reply(0, light, examples=None, metrics={"minutes": 1.0}),
        reply(1, heavy, examples=None, metrics={"minutes": 3.0}),
    ]
    arrays, _ = strategy.aggregate_train(1, messages)
    for name, value in to_params(arrays).items():
        torch.testing.assert_close(value, 0.25 * light[name] + 0.75 * heavy[name])


def test_metrics_of_the_wrapped_strategy_are_kept():
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE)
    send(strategy, mlp().state_dict())
    messages = [reply(node, params, metrics={"loss": 1.0 + node}) for node, params in enumerate(clients(2))]
    _, metrics = strategy.aggregate_train(1, messages)
    assert metrics["loss"] == 1.5


def test_diagnostics_name_every_tensor_of_every_client():
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE, diagnostics=True)
    send(strategy, mlp().state_dict())
    _, metrics = strategy.aggregate_train(1, [reply(node, params) for node, params in enumerate(clients(3))])
    assert {len(metrics[f"c2m3-agreement/{name}"]) for name in mlp().state_dict()} == {3}
    assert sorted(metrics["c2m3-nodes"]) == [0, 1, 2]
    assert all(metrics[f"c2m3-{phase}-seconds"] > 0 for phase in ("check", "match", "aggregate"))
    for key in ("c2m3-node-moved", "c2m3-node-agreement", "c2m3-node-outlier"):
        assert len(metrics[key]) == 3


def test_by_default_a_round_reports_its_main_numbers_and_what_is_unusual(caplog):
    """The others are in the log, one line at DEBUG: Flower prints all metrics of every round."""
    caplog.set_level(logging.DEBUG, logger="flwr")
    labelled = [tuple(each[:300] for each in digits())]
    strategy = C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), calibration=labelled)
    send(strategy, mlp().state_dict())
    halved = {name: value.half() for name, value in clients(3)[2].items()}
    _, metrics = strategy.aggregate_train(1, [reply(n, each) for n, each in enumerate([*clients(2), halved])])
    main = ("replies", "dropped", "kept-previous", "objective-before", "objective-after", "share-moved", "cast")
    (deployed,) = (name for name in metrics if "deployed/" in name)
    deployment = (deployed, "c2m3-repaired", "c2m3-fed-back")
    assert metrics.keys() - {"num-examples"} == {*(f"c2m3-{name}" for name in main), *deployment}
    (line,) = (text for text in caplog.messages if "numbers of the round" in text)
    for name in ("c2m3-gap", "c2m3-guard-kept/none", "c2m3-match-seconds", "c2m3-node-moved", *metrics):
        assert repr(name) in line


def test_metrics_can_be_sent_like_any_record():
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE, diagnostics=True)
    send(strategy, mlp().state_dict())
    _, metrics = strategy.aggregate_train(1, [reply(node, params) for node, params in enumerate(clients(3))])
    assert MetricRecord.inflate(metrics.deflate()) == metrics


def test_identity_is_what_shared_starts_give():
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE)
    send(strategy, mlp().state_dict())
    strategy.aggregate_train(1, [reply(n, params) for n, params in enumerate(clients(3, independent=False, epochs=1))])
    assert all(strategy.setup.aligner.memory.recall(node) is None for node in range(3))
