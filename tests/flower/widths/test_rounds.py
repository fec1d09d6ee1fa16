"""Rounds of clients of several widths."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAvg, FedMedian, Krum
from torch import nn

from c2m3_fl.core import permutation
from c2m3_fl.errors import ConfigError, SpecError
from c2m3_fl.flower import C2M3, RegMean, SerialGrid
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.widths.rounds import _at_rest
from c2m3_fl.merging.widths.injections import carry
from tests.flower.federation import EXAMPLE, aggregate, digits, good, mlp, patient, reply, same, send, shuffled
from tests.flower.widths.federation import WIDTHS, narrow, shapes, sized, sized_app

START = ArrayRecord(mlp().state_dict())


@pytest.fixture
def strategy():
    return sized()


@pytest.fixture
def sent(strategy):
    """What each of three clients of the three widths was sent, once their widths are known."""
    return _sent(strategy, {1: 0, 2: 1, 3: 2})


def _sent(strategy, places):
    strategy.server.resizing.note(places)
    messages = send(strategy, mlp().state_dict(), nodes=len(places))
    return [to_params(each.content["arrays"]) for each in sorted(messages, key=lambda each: each.metadata.dst_node_id)]


def test_each_client_is_sent_its_own_width(sent):
    assert [shapes(from_params(each))[0] for each in sent] == [(width, 64) for width in WIDTHS]


def test_replies_that_nothing_changed_give_the_model_that_was_sent(strategy, sent):
    arrays, metrics = strategy.aggregate_train(1, [reply(node + 1, each) for node, each in enumerate(sent)])
    assert metrics["c2m3-share-moved"] == 0
    assert _distance(arrays) < 1e-6


def test_an_entry_is_the_mean_of_its_owners(strategy, sent):
    """Clients add 1, 2 and 4 thousandths to every number that they were sent, and weigh 1, 1 and 2."""
    replies = [
        reply(node + 1, {name: value + 1e-3 * 2**node for name, value in each.items()}, examples=max(1, node))
        for node, each in enumerate(sent)
    ]
    arrays, _ = strategy.aggregate_train(1, replies)
    found = 1e3 * (to_params(arrays)["0.bias"] - mlp().state_dict()["0.bias"])
    cuts = strategy.server.resizing.cuts(mlp().state_dict(), deployed=False)
    first = _first(strategy)
    middle, small = (set(cuts.units(place)[first].tolist()) for place in (1, 2))
    shares = {(False, False): 1.0, (True, False): 1.5, (False, True): 3.0, (True, True): (1 + 2 + 2 * 4) / 4}
    expected = torch.tensor([shares[unit in middle, unit in small] for unit in range(32)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("inside", "expected"), [(FedMedian(), 2.0), (Krum(num_malicious_nodes=0), None)])
def test_robust_strategies_inside(inside, expected):
    """Of a unit that all have the median; Krum leaves a unit that not all have as it was sent."""
    strategy = sized(inside)
    sent = _sent(strategy, {1: 0, 2: 0, 3: 0, 4: 1})
    steps = (1.0, 2.0, 4.0, 2.0)
    replies = [
        reply(node + 1, {name: value + step * 1e-3 for name, value in each.items()})
        for node, (each, step) in enumerate(zip(sent, steps, strict=True))
    ]
    arrays, _ = strategy.aggregate_train(1, replies)
    found = (to_params(arrays)["0.bias"] - mlp().state_dict()["0.bias"]) * 1e3
    units = strategy.server.resizing.cuts(mlp().state_dict(), deployed=False).units(1)[_first(strategy)]
    others = torch.ones(32, dtype=torch.bool)
    others[units] = False
    if expected is None:
        assert bool((found[others] == 0).all())
        assert bool((found[units].round() == found[units].round()[0]).all())
        assert float(found[units][0].round()) in steps
    else:
        torch.testing.assert_close(found, torch.full((32,), expected), rtol=0, atol=1e-3)


def test_a_narrow_client_that_permutes_its_units_is_brought_back(strategy, sent):
    spec = strategy.server.resizing.sizes.networks[1].spec
    moved = [sent[0], shuffled(spec, sent[1], 3), sent[2]]
    arrays, metrics = strategy.aggregate_train(1, [reply(node + 1, each) for node, each in enumerate(moved)])
    assert metrics["c2m3-share-moved"] > 0
    assert _distance(arrays) < 1e-6


def test_a_narrow_copy_of_the_model_is_matched_exactly(strategy, sent):
    """The wide reply comes in another order of its units, the narrow ones as they were sent."""
    big = shuffled(strategy.setup.spec, sent[0], 5)
    arrays, _ = strategy.aggregate_train(1, [reply(1, big), reply(2, sent[1]), reply(3, sent[2])])
    assert _distance(arrays) < 1e-6


def test_a_reply_of_an_unknown_width_is_dropped_and_named(strategy, sent, caplog):
    replies = [reply(1, sent[0]), reply(2, sent[1]), reply(3, narrow(11, 0))]
    with caplog.at_level("WARNING", logger="flwr"):
        _, metrics = strategy.aggregate_train(1, replies)
    assert metrics["c2m3-dropped"] == 1
    assert "dropped the reply of node 3: reply: '0.weight' has shape (11, 64), expected (32, 64)" in caplog.text


def test_faults_of_narrow_replies_are_those_of_wide_ones(strategy, sent, caplog):
    bad = dict(sent[1])
    bad["0.weight"] = bad["0.weight"] * torch.nan
    short = reply(3, sent[2])
    short.content["arrays"]["0.weight"].data = short.content["arrays"]["0.weight"].data[:-8]
    with caplog.at_level("WARNING", logger="flwr"):
        arrays, metrics = strategy.aggregate_train(1, [reply(1, sent[0]), reply(2, bad), short])
    assert metrics["c2m3-dropped"] == 2
    assert "dropped the reply of node 2" in caplog.text
    assert "NaN or infinite" in caplog.text
    assert "dropped the reply of node 3: reply: '0.weight' holds" in caplog.text
    assert _distance(arrays) < 1e-6


def test_a_hostile_narrow_reply_is_named_and_honest_ones_of_any_width_are_not():
    strategy = sized(outliers="drop")
    places = {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2, 7: 2}
    sent = _sent(strategy, places)
    step = {name: 0.01 * torch.randn(value.shape) for name, value in mlp().state_dict().items()}
    cuts = strategy.server.resizing.cuts(mlp().state_dict(), deployed=False)
    wide = strategy.server.resizing.sizes
    replies = []
    for node, each in enumerate(sent):
        own = step if not places[node + 1] else _cut(wide, cuts, places[node + 1], step)
        scale = 50.0 if node == 6 else 1.0
        noise = {name: 0.003 * torch.randn(value.shape) for name, value in each.items()}
        replies.append(
            reply(node + 1, {name: value + scale * (own[name] + noise[name]) for name, value in each.items()})
        )
    _, metrics = strategy.aggregate_train(1, replies)
    assert (metrics["c2m3-dropped"], metrics["c2m3-outliers"]) == (1, 1)


def test_a_network_of_a_far_narrower_width_is_no_outlier_for_that():
    """Fewer inputs make larger weights: those of eight units are six times as large as those of 256."""
    widths = (256, 256, 256, 256, 8)
    strategy = C2M3(model=mlp(0, 256), sizes=[mlp(0, 8)], example_inputs=EXAMPLE, max_steps=1, outliers="drop")
    strategy.server.resizing.note({node: int(width == 8) for node, width in enumerate(widths, 1)})
    send(strategy, mlp(0, 256).state_dict(), nodes=len(widths))
    replies = [reply(node, narrow(width, node)) for node, width in enumerate(widths, 1)]
    _, metrics = strategy.aggregate_train(1, replies)
    assert metrics["c2m3-dropped"] == 0


def _distance(arrays):
    """The largest difference of an aggregate from the model that was sent."""
    return max(float((to_params(arrays)[name] - value).abs().max()) for name, value in mlp().state_dict().items())


def _first(strategy):
    """The group of the first hidden layer."""
    return strategy.setup.spec.tensors["0.weight"].axes[0][0].group


def _cut(sizes, cuts, place, params):
    return carry(sizes.spec, sizes.networks[place].spec, cuts.units(place), params)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"sizes": [mlp(0, 64)]}, ConfigError, "sizes[0] is wider than model"),
        ({"sizes": [mlp(0, 32)]}, ConfigError, "sizes[0] has the shapes of model"),
        ({"sizes": mlp(0, 16)}, ConfigError, "expected narrower networks"),
        ({"sizes": [nn.Linear(64, 10)]}, SpecError, "sizes[0] differs from model in more than its width"),
        ({"basis": "client"}, ConfigError, "expected 'global' with sizes="),
        ({"recalibrate": RegMean()}, ConfigError, "recalibrate is RegMean"),
        ({"judge": "clients"}, ConfigError, "judge is 'clients', which asks clients"),
        ({"head": "labels"}, ConfigError, "head is 'labels', which asks clients"),
        ({"exchanged": ["0.weight"]}, ConfigError, "they must exchange all"),
        ({"lora": "exact"}, ConfigError, "expected 'apart' with sizes="),
    ],
)
def test_what_needs_one_width_is_refused(options, error, text):
    given = {"sizes": [mlp(0, 16)], **options}
    with pytest.raises(error) as caught:
        C2M3(FedAvg(), model=mlp(), example_inputs=EXAMPLE, **given)
    assert text in str(caught.value)


@pytest.mark.slow
def test_a_federation_of_three_widths_learns_at_every_width():
    strategy = sized(calibration=list(digits()[0][:300].split(100)))
    widths = [32, 16, 8, 8, 16]
    grid = SerialGrid(sized_app(widths, epochs=4), 5)
    result = strategy.start(grid=grid, initial_arrays=START, num_rounds=3)
    assert dict(strategy.server.resizing.places) == {1: 0, 2: 1, 3: 2, 4: 2, 5: 1}
    assert [shapes(strategy.at_width(result.arrays, place))[0] for place in (0, 1)] == [(16, 64), (8, 64)]
    assert result.evaluate_metrics_clientapp[3]["accuracy"] > 0.7  # .1 is chance; each client at its own width


def test_clients_that_do_not_tell_their_width_are_known_by_their_first_reply(caplog):
    strategy = sized()
    app = sized_app([32, 16, 8], tells=False, independent=True, epochs=1)
    with caplog.at_level("INFO", logger="flwr"):
        strategy.start(grid=SerialGrid(app, 3), initial_arrays=START, num_rounds=2)
    assert "the width of 3 of 3 nodes is unknown" in caplog.text
    assert dict(strategy.server.resizing.places) == {1: 0, 2: 1, 3: 2}
    assert strategy.server.idle == 0


def test_only_replies_of_the_models_width_give_what_one_width_gives():
    found, _ = aggregate(good(), sized())
    expected, _ = aggregate(good(), patient())
    assert same(found, expected)


def test_widths_are_saved(strategy, sent):
    state = strategy.state_dict()
    other = sized()
    other.load_state_dict(state)
    assert dict(other.server.resizing.places) == {1: 0, 2: 1, 3: 2}
    with pytest.raises(SpecError, match="pass the same sizes="):
        patient().load_state_dict({name: value for name, value in state.items() if name.startswith("widths/")})


def test_a_width_is_remembered_by_its_tensors_whatever_the_order_of_the_sizes(strategy, sent):
    state = strategy.server.resizing.state_dict()
    turned, fewer = (
        C2M3(model=mlp(), sizes=[mlp(0, width) for width in widths], example_inputs=EXAMPLE).server.resizing
        for widths in ((8, 16), (8,))
    )
    turned.load_state_dict(state)
    assert dict(turned.places) == {1: 0, 2: 2, 3: 1}
    with pytest.raises(SpecError, match="other sizes"):
        fewer.load_state_dict(state)


def test_no_width_of_a_round_is_forgotten_while_the_round_is_sent_out():
    strategy = sized(memory=2)
    strategy.server.resizing.note({1: 1, 2: 2})
    grid = SerialGrid(sized_app([16, 8, 16, 8]), 4)
    messages = strategy.configure_train(1, START, ConfigRecord(), grid)
    found = {each.metadata.dst_node_id: shapes(each.content["arrays"])[0][0] for each in messages}
    assert found == {1: 16, 2: 8, 3: 16, 4: 8}


def test_a_node_that_does_not_say_its_width_is_asked_once():
    asked = []

    def heard(replies):
        asked.extend(each.metadata.src_node_id for each in replies if each.metadata.message_type.startswith("query"))
        return replies

    app = sized_app([32, 32], tells=False, epochs=0)
    grid = SerialGrid(app, 2, transit=heard)
    strategy = sized()
    for current in (1, 2):
        list(strategy.configure_train(current, START, ConfigRecord(), grid))
    assert sorted(asked) == [1, 2]


def test_dead_units_stay_where_they_were(strategy):
    spec = strategy.setup.spec
    units = {name: torch.arange(32).where(torch.arange(32) < 16, -1) for name in spec.groups}
    move = {name: torch.arange(32).flip(0) for name in spec.groups}
    back = {name: torch.cat([torch.arange(16), torch.arange(16, 32).flip(0)]) for name in spec.groups}
    assert permutation.is_identity(_at_rest(spec, back, units))
    found = _at_rest(spec, move, units)
    for index in found.values():
        assert index[16:].tolist() == list(range(15, -1, -1))  # live units move as they did
        assert sorted(index[:16].tolist()) == list(range(16, 32))
