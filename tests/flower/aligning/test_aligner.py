"""Which basis the replies end up in, and what is remembered of where they were."""

from __future__ import annotations

from logging import DEBUG

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.core import permutation
from c2m3_fl.core.basis import into_basis
from c2m3_fl.errors import SpecError
from c2m3_fl.flower.aligning.memory import Memory
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, accuracy, clients, digits, digits_app, mlp, reply, send, shuffled, train


def c2m3(**options):
    return C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE, diagnostics=True, **options)


def home(strategy, params, reference):
    """Whether two networks are in one basis: aligning the first with the second moves nothing."""
    return permutation.is_identity(into_basis(strategy.setup.spec, reference, params))


def merged(strategy, replies, sent):
    send(strategy, sent)
    arrays, _ = strategy.aggregate_train(1, replies)
    return to_params(arrays)


@pytest.mark.parametrize(
    ("basis", "expected"), [("global", None), ("client", None), ("largest", 2), (1, 1), (77, None)]
)
def test_a_round_ends_in_the_basis_that_was_asked_for(basis, expected):
    strategy = c2m3(basis=basis)
    trained = clients(4)
    sent = shuffled(strategy.setup.spec, trained[3], 5)
    replies = [reply(node, params, examples=10 + node) for node, params in enumerate(trained[:3])]
    result = merged(strategy, replies, sent)
    reference = sent if expected is None else trained[expected]
    assert home(strategy, result, reference)
    others = [params for params in [sent, *trained[:3]] if params is not reference]
    assert not any(home(strategy, result, other) for other in others)


@pytest.mark.parametrize("alignment", ["joint", "separate"])
def test_replies_that_agree_with_each_other_but_not_with_what_was_sent_end_in_its_basis(alignment):
    """Every client loads one checkpoint, which is not in the order of the server's model."""
    strategy = c2m3(alignment=alignment)
    spec, (sent, *_) = strategy.setup.spec, clients(1)
    near = [
        {name: value + 0.001 * torch.randn(value.shape, generator=generator) for name, value in sent.items()}
        for generator in (torch.Generator().manual_seed(seed) for seed in range(3))
    ]
    for _ in range(2):  # the second time they start from where they were found
        send(strategy, sent)
        arrays, metrics = strategy.aggregate_train(
            1, [reply(node, shuffled(spec, params, 7)) for node, params in enumerate(near)]
        )
        result = to_params(arrays)
        assert home(strategy, result, sent)
        assert metrics["c2m3-share-moved"] > 0.5
        for name, value in result.items():
            torch.testing.assert_close(value, sum(params[name] for params in near) / 3)
        assert result["0.weight"].sub(sent["0.weight"]).abs().max() < 0.01


def test_an_absent_node_is_named_when_its_basis_was_asked_for(caplog):
    strategy = c2m3(basis=77)
    merged(strategy, [reply(node, params) for node, params in enumerate(clients(3))], mlp().state_dict())
    assert any("node 77 did not reply" in text for text in caplog.messages)


@pytest.mark.parametrize("alignment", ["joint", "separate"])
def test_every_step_of_a_match_has_its_log_line(alignment, caplog):
    strategy = c2m3(alignment=alignment)
    with caplog.at_level(DEBUG, logger="flwr"):
        merged(strategy, [reply(node, params) for node, params in enumerate(clients(3))], mlp().state_dict())
    lines = [text for text in caplog.messages if "match: step" in text]
    assert "step 1, agreement" in lines[0]
    assert all(("gap" in line or "gain" in line) and "% of units moved" in line for line in lines)


def test_all_bases_give_the_same_function():
    trained, results = clients(3), {}
    for basis in ("global", "largest", 0, "client"):
        replies = [reply(node, params, examples=10 + node) for node, params in enumerate(trained)]
        model = mlp()
        model.load_state_dict(merged(c2m3(basis=basis), replies, mlp().state_dict()))
        with torch.no_grad():
            results[basis] = model(digits()[0][:100])
    for found in results.values():
        torch.testing.assert_close(found, results["global"])


def own_basis_app(seen):
    """Silos that hold on to their neuron order: a fixed feature of unit 0 tells when it is not theirs."""
    app = ClientApp()

    @app.train()
    def fit(message: Message, context) -> Message:
        current, partition = int(message.content["config"]["server-round"]), int(context.node_config["partition-id"])
        model = mlp(1000 + partition)
        if current > 1:
            model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        seen.setdefault(partition, []).append(message.content["arrays"].to_torch_state_dict())
        data, labels = (each[:1200][partition::4] for each in digits())
        train(model, data, labels, epochs=8, seed=partition)
        seen[partition].append({name: value.detach().clone() for name, value in model.state_dict().items()})
        return Message(
            RecordDict({"arrays": from_params(model.state_dict()), "metrics": MetricRecord({"num-examples": 1})}),
            reply_to=message,
        )

    return app


def test_each_client_gets_the_model_in_the_neuron_order_that_it_last_sent():
    seen = {}
    strategy = c2m3(basis="client")
    result = strategy.start(SerialGrid(own_basis_app(seen), 4), from_params(mlp().state_dict()), num_rounds=3)
    for received, sent, again, _, third, _ in seen.values():
        assert home(strategy, again, sent), "round two starts in the order that the client ended round one in"
        assert home(strategy, third, sent)
        assert not home(strategy, again, received)
    moves = [strategy.setup.aligner.memory.recall(node) for node in range(1, 5)]
    assert all(move is not None for move in moves)
    assert accuracy(mlp, result.arrays) > 0.85


def test_clients_in_their_own_bases_need_no_search_in_later_rounds():
    strategy = c2m3(basis="client")
    result = strategy.start(SerialGrid(own_basis_app({}), 4), from_params(mlp().state_dict()), num_rounds=3)
    first, *later = result.train_metrics_clientapp.values()
    assert first["c2m3-steps"] > 0
    assert all(metrics["c2m3-steps"] == 0 for metrics in later)


def test_evaluation_too_is_in_each_clients_own_basis():
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE, basis="client")
    send(strategy, mlp().state_dict(), nodes=3)
    arrays, _ = strategy.aggregate_train(1, [reply(node + 1, params) for node, params in enumerate(clients(3))])
    grid = SerialGrid(digits_app(), 3)
    messages = list(strategy.configure_evaluate(1, arrays, ConfigRecord(), grid))
    records = {each.metadata.dst_node_id: each.content["arrays"] for each in messages}
    for node, trained in enumerate(clients(3), start=1):
        assert home(strategy, to_params(records[node]), trained)
        assert accuracy(mlp, records[node]) == accuracy(mlp, arrays)


def test_a_late_joiner_with_a_model_of_its_own_is_taken_in():
    """Four nodes share a model for some rounds; in the last one a stranger brings its own."""
    strategy = c2m3()
    result = strategy.start(SerialGrid(digits_app(epochs=4), 4), from_params(mlp().state_dict()), num_rounds=4)
    settled = to_params(result.arrays)
    stranger = clients(3, epochs=20)[2]

    def replies():
        return [*(reply(node, settled) for node in range(1, 5)), reply(50, stranger, examples=40)]

    send(strategy, settled, nodes=4, round_number=5)
    arrays, metrics = strategy.aggregate_train(5, replies())
    moved = dict(zip(metrics["c2m3-nodes"], metrics["c2m3-node-moved"], strict=True))
    assert moved.pop(50) > 0.5
    assert set(moved.values()) == {0.0}, "those who were at home stay there"
    plain, _ = FedAvg().aggregate_train(5, replies())
    assert accuracy(mlp, arrays) > accuracy(mlp, plain) + 0.03


def test_a_node_that_comes_back_after_a_long_absence_starts_where_it_was_last_found():
    strategy = c2m3()
    sent, *_ = clients(1)
    spec = strategy.setup.spec
    send(strategy, sent)
    strategy.aggregate_train(1, [reply(1, sent), reply(2, sent), reply(9, shuffled(spec, sent, 4))])
    for current in range(2, 7):
        send(strategy, sent, round_number=current)
        strategy.aggregate_train(current, [reply(1, sent), reply(2, sent)])
    send(strategy, sent, round_number=7)
    _, metrics = strategy.aggregate_train(7, [reply(1, sent), reply(2, sent), reply(9, shuffled(spec, sent, 4))])
    assert metrics["c2m3-steps"] == 0
    assert dict(zip(metrics["c2m3-nodes"], metrics["c2m3-node-moved"], strict=True))[9] > 0.5


def test_a_node_that_took_over_the_global_basis_does_not_start_where_it_was():
    strategy = c2m3()
    sent, *_ = clients(1)
    for params in (shuffled(strategy.setup.spec, sent, 4), sent):
        send(strategy, sent)
        _, metrics = strategy.aggregate_train(1, [reply(1, sent), reply(9, params)])
    assert metrics["c2m3-share-moved"] == 0
    assert strategy.setup.aligner.memory.recall(9) is None


def test_sampling_a_part_of_the_nodes_in_every_round_learns():
    strategy = C2M3(
        FedAvg(fraction_train=0.4, fraction_evaluate=0.0, min_train_nodes=2), model=mlp(), example_inputs=EXAMPLE
    )
    grid = SerialGrid(digits_app(independent=True, epochs=8), 8)
    result = strategy.start(grid, from_params(mlp().state_dict()), num_rounds=4)
    assert [metrics["c2m3-replies"] for metrics in result.train_metrics_clientapp.values()] == [3] * 4
    assert accuracy(mlp, result.arrays) > 0.8


def memory(limit=10):
    return Memory(c2m3().setup.spec, limit)


def drawn(spec, seed):
    return permutation.random(spec, torch.Generator().manual_seed(seed))


def test_memory_is_bounded_and_forgets_who_was_not_heard_of_for_longest():
    held = memory(limit=3)
    for node in (1, 2, 3):
        held.remember(node, drawn(held.spec, node))
    held.remember(1, drawn(held.spec, 1))
    held.remember(4, drawn(held.spec, 4))
    assert [node for node in (1, 2, 3, 4) if held.recall(node) is not None] == [1, 3, 4]
    assert len(held) == 3


def test_nodes_in_the_global_basis_take_no_room():
    held = memory()
    held.remember(1, drawn(held.spec, 1))
    held.remember(1, permutation.identity(held.spec))
    assert len(held) == 0
    assert held.recall(1) is None


def test_memory_comes_back_from_its_tensors():
    held, back = memory(), memory()
    for node in (5, 2**63 + 11):
        held.remember(node, drawn(held.spec, node % 1000))
    back.load_state_dict(held.state_dict())
    assert list(back.state_dict()) == list(held.state_dict())
    for node in (5, 2**63 + 11):
        left, right = back.recall(node), held.recall(node)
        assert all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize("state", [{"nonsense": torch.zeros(1)}, {"0/1/unknown": torch.arange(3)}])
def test_a_memory_of_another_network_is_refused(state):
    with pytest.raises(SpecError):
        memory().load_state_dict(state)


def test_the_record_of_a_personal_model_is_a_record_of_its_own():
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE, basis="client")
    send(strategy, mlp().state_dict(), nodes=2)
    arrays, _ = strategy.aggregate_train(1, [reply(node + 1, params) for node, params in enumerate(clients(2))])
    first, second = strategy.configure_train(2, arrays, ConfigRecord(), SerialGrid(digits_app(), 2))
    assert isinstance(first.content["arrays"], ArrayRecord)
    assert first.content["arrays"] != second.content["arrays"]
    assert first.content["config"] == second.content["config"]
