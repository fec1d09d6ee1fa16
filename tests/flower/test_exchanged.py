"""Clients that send a part of the state dict: what they keep fixes the order of its units, the rest still moves."""

from __future__ import annotations

import logging
from operator import itemgetter

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from c2m3_fl.core import permutation
from c2m3_fl.errors import ConfigError, ParamsError
from c2m3_fl.flower.exchanged import restrict
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.symmetry.discover import permutation_spec
from tests.flower.federation import EXAMPLE, aggregate, clients, mlp, normed, reply, same, send, shuffled


def two_blocks():
    """One block with a norm, one without."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10)
    )


def part(params, names):
    return {name: params[name] for name in params if name in names}


first = itemgetter(0)
BODY = ["2.weight", "2.bias", "4.weight", "4.bias"]  # of the perceptron: carries the second hidden layer as a whole


def test_a_group_moves_where_all_its_carriers_are_exchanged():
    spec = permutation_spec(mlp(), EXAMPLE)
    found = restrict(spec, BODY)
    assert list(found.tensors) == BODY
    assert [each.size for each in found.groups.values()] == [32]
    assert {name for name in found.groups for name, _ in found.members(name)} == {"2.weight", "2.bias", "4.weight"}
    assert not restrict(spec, ["4.weight", "4.bias"]).groups
    assert restrict(spec, list(spec.tensors)) == spec


def test_norms_that_stay_at_home_pin_their_units_and_no_others():
    model = two_blocks()
    spec = permutation_spec(model, EXAMPLE)
    without_norms = [name for name in spec.tensors if not name.startswith("1.")]
    found = restrict(spec, without_norms)
    assert [each.size for each in found.groups.values()] == [12]
    assert not found.tensors["0.weight"].axes[0]
    parameters = [name for name, _ in model.named_parameters()]
    assert [each.size for each in restrict(spec, parameters).groups.values()] == [12]


def test_groups_that_move_each_other_stay_together():
    """Attention heads and the units inside them: one projection kept at home pins both."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    spec = permutation_spec(layer, torch.randn(2, 5, 16))
    family = {name for name, each in spec.groups.items() if each.parent is not None or spec.children(name)}
    carrier = next(name for name in spec.tensors if any(name in map(first, spec.members(each)) for each in family))
    found = restrict(spec, [name for name in spec.tensors if name != carrier])
    assert not family & found.groups.keys()
    assert found.groups


def test_a_part_is_found_from_the_first_arrays_and_is_aggregated_as_the_wrapped_strategy_does(caplog):
    caplog.set_level(logging.INFO, logger="flwr")
    head = ["4.weight", "4.bias"]
    replies = [reply(node, part(each, head)) for node, each in enumerate(clients(3))]
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE)
    for _ in range(2):
        arrays, metrics = aggregate(replies, strategy, part(mlp().state_dict(), head))
    plain = FedAvg()
    send(plain, part(mlp().state_dict(), head))
    expected = to_params(plain.aggregate_train(1, replies)[0])
    torch.testing.assert_close(to_params(arrays), expected)
    assert metrics["c2m3-dropped"] == 0
    said = [text for text in caplog.messages if "exchange" in text]
    assert said == ["\t> the clients exchange 2 of 6 tensors: 0 of 2 groups of units are in those alone and may move"]


def test_what_is_exchanged_as_a_whole_is_aligned():
    """Three orders of one body's second hidden layer are one body."""
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE, memory=0)
    sent = part(mlp().state_dict(), BODY)
    send(strategy, sent)
    trained = part(clients(1, independent=False)[0], BODY)
    moved = [shuffled(strategy.setup.spec, trained, seed) for seed in range(3)]
    arrays, metrics = strategy.aggregate_train(1, [reply(node, each) for node, each in enumerate(moved)])
    assert metrics["c2m3-share-moved"] > 0.8
    for name, value in to_params(arrays).items():
        torch.testing.assert_close(value, trained[name])


def test_batchnorm_at_home_runs_rounds_and_keeps_every_order():
    names = [name for name in normed().state_dict() if not name.startswith("1.")]
    sent = part(normed().state_dict(), names)
    strategy = C2M3(model=normed(), example_inputs=EXAMPLE, exchanged=names)
    assert not strategy.setup.spec.groups
    other = [part(normed(seed).state_dict(), names) for seed in range(1, 4)]
    arrays, metrics = aggregate([reply(node, each) for node, each in enumerate(other)], strategy, sent)
    assert metrics["c2m3-share-moved"] == 0
    torch.testing.assert_close(to_params(arrays)["0.weight"], torch.stack([each["0.weight"] for each in other]).mean(0))


def test_a_reply_with_more_or_less_than_the_others_is_dropped():
    head = ["4.weight", "4.bias"]
    good, whole, less = clients(3)
    replies = [reply(0, part(good, head)), reply(1, whole), reply(2, part(less, head[:1]))]
    _, metrics = aggregate(replies, C2M3(model=mlp(), example_inputs=EXAMPLE), part(mlp().state_dict(), head))
    assert (metrics["c2m3-replies"], metrics["c2m3-dropped"]) == (1, 2)


def test_a_run_of_whole_models_can_follow_one_of_parts():
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE)
    send(strategy, part(mlp().state_dict(), BODY))
    send(strategy, mlp().state_dict())
    assert len(strategy.setup.spec.groups) == 2


def test_what_was_remembered_of_a_part_is_taken_up_again():
    first, second = (C2M3(model=mlp(), example_inputs=EXAMPLE) for _ in range(2))
    sent = part(mlp().state_dict(), BODY)
    replies = [
        reply(node, permutation.apply(restrict(first.setup.spec, BODY), move, part(each, BODY)))
        for node, each in enumerate(clients(2, independent=False))
        for move in [permutation.random(restrict(first.setup.spec, BODY), torch.Generator().manual_seed(node))]
    ]
    arrays, _ = aggregate(replies, first, sent)
    second.load_state_dict(first.state_dict())
    assert len(second.setup.aligner.memory) == 2
    for strategy in (first, second):
        list(strategy.configure_train(2, arrays, ConfigRecord(), SerialGrid(ClientApp(), 2)))
    assert same(first.aggregate_train(2, replies)[0], second.aggregate_train(2, replies)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exchanged": ["5.weight"]}, "exchanged has \\['5.weight'\\], expected some of the model's"),
        ({"exchanged": []}, "exchanged has no names"),
        ({"exchanged": "4.weight"}, r"exchanged is the text '4.weight', expected names: exchanged=\['4.weight'\]"),
        (
            {"exchanged": BODY, "recalibrate": "repair", "calibration": [torch.rand(32, 64)]},
            "recalibrate needs the who",
        ),
        ({"exchanged": BODY, "judge": "clients"}, "judge needs the whole model"),
    ],
    ids=["strange", "none", "text", "repair", "judge"],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        C2M3(model=mlp(), example_inputs=EXAMPLE, **options)


def test_arrays_that_are_not_what_was_named_are_refused():
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE, exchanged=BODY)
    with pytest.raises(
        ParamsError, match=r"hold \['0.weight', '0.bias'\], which exchanged= does not name: start the run"
    ):
        send(strategy, mlp().state_dict())
    with pytest.raises(ParamsError, match="missing"):
        send(strategy, part(mlp().state_dict(), ["0.weight", *BODY[1:]]))
    with pytest.raises(ParamsError, match="keys differ"):
        send(C2M3(model=mlp(), example_inputs=EXAMPLE), {"6.weight": torch.zeros(2)})
    assert isinstance(from_params(part(mlp().state_dict(), BODY)), ArrayRecord)
