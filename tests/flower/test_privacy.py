"""Differential privacy: what is refused, what is offered, and why the offer is sound."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ConfigRecord
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.queries.refit import ClientRefit
from c2m3_fl.flower.resuming.resumable import Resumable
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import (
    EXAMPLE,
    accuracy,
    answering,
    calibration,
    clients,
    digits_app,
    mlp,
    reply,
    same,
    send,
    shuffled,
)

WRAPPERS = {
    "server, fixed": lambda inner: DifferentialPrivacyServerSideFixedClipping(inner, 0.01, 10.0, 5),
    "client, fixed": lambda inner: DifferentialPrivacyClientSideFixedClipping(inner, 0.01, 10.0, 5),
    "server, adaptive": lambda inner: DifferentialPrivacyServerSideAdaptiveClipping(inner, 0.01, 5, 20.0),
    "client, adaptive": lambda inner: DifferentialPrivacyClientSideAdaptiveClipping(inner, 0.01, 5),
}
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())


def c2m3(inner=None, **options):
    return C2M3(inner, model=mlp(), example_inputs=EXAMPLE, **options)


def sending(strategy):
    grid = SerialGrid(digits_app(), 5)
    return list(strategy.configure_train(1, from_params(mlp().state_dict()), ConfigRecord(), grid))


@each_wrapper
def test_inside_a_joint_match_privacy_is_refused_with_the_reason(wrap):
    with pytest.raises(ConfigError, match="every client's permutation depends on all the others"):
        c2m3(wrap(FedAvg()))


@each_wrapper
def test_around_a_joint_match_privacy_is_refused_before_anything_is_sent(wrap):
    with pytest.raises(ConfigError, match="pass alignment='separate'"):
        sending(wrap(c2m3()))


def test_refusal_looks_through_other_wrappers(tmp_path):
    with pytest.raises(ConfigError, match="DifferentialPrivacyServerSideFixedClipping"):
        c2m3(Resumable(WRAPPERS["server, fixed"](FedAvg()), tmp_path))
    with pytest.raises(ConfigError, match="DifferentialPrivacyServerSideFixedClipping"):
        sending(WRAPPERS["server, fixed"](Resumable(c2m3(), tmp_path)))


@each_wrapper
def test_recalibration_by_every_clients_statistics_is_refused_too(wrap):
    with pytest.raises(ConfigError, match="pass calibration=None"):
        C2M3(wrap(FedAvg()), model=mlp(), calibration=calibration(), alignment="separate")


ASKING = {"head": {"head": "labels"}, "recalibrate": {"recalibrate": ClientRefit()}, "judge": {"judge": "clients"}}


@each_wrapper
@pytest.mark.parametrize(("name", "options"), ASKING.items(), ids=ASKING.keys())
def test_what_asks_the_clients_is_refused_by_name_inside_and_outside(wrap, name, options):
    with pytest.raises(ConfigError, match=f"{name} asks the clients for more about their data"):
        c2m3(wrap(FedAvg()), alignment="separate", **options)
    with pytest.raises(ConfigError, match=f"leave {name} out"):
        sending(wrap(c2m3(alignment="separate", **options)))


@each_wrapper
@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
def test_with_separate_alignment_both_orders_are_accepted(wrap, outside):
    strategy = wrap(c2m3(alignment="separate")) if outside else c2m3(wrap(FedAvg()), alignment="separate")
    assert len(sending(strategy)) == 5


class Noting(C2M3):
    """Notes, for every round, what it returns, its trajectory, and what the wrapped strategy aggregated."""

    def __init__(self):
        self.rounds = []
        super().__init__(Aggregating(self.rounds), model=mlp(), example_inputs=EXAMPLE, alignment="separate")

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.rounds[-1] |= {"deployed": arrays.copy(), "trajectory": self.trajectory, "moved": metrics}
        return arrays, metrics


class Aggregating(FedAvg):
    def __init__(self, rounds):
        super().__init__(fraction_evaluate=0.0)
        self.rounds = rounds

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.rounds.append({"aggregate": arrays.copy()})
        return arrays, metrics


@pytest.mark.parametrize("name", ["server, fixed", "client, fixed", "server, adaptive"])
def test_inside_a_wrapper_for_privacy_what_is_deployed_is_the_trajectory_bit_for_bit(name):
    """Though units move, and clients would answer for a head and judge it."""
    asked = []
    app = answering(app=digits_app(independent=True, epochs=1, evaluates="loss"), first_layer=True)
    grid = SerialGrid(app, 5, transit=lambda replies: asked.extend(m.metadata.message_type for m in replies) or replies)
    inside = Noting()
    WRAPPERS[name](inside).start(grid, from_params(mlp().state_dict()), num_rounds=2)
    assert asked == ["train"] * 10
    assert inside.rounds[0]["moved"]["c2m3-share-moved"] > 0.5
    assert len(inside.rounds) == 2
    for found in inside.rounds:
        assert same(found["deployed"], found["trajectory"])
        assert same(found["deployed"], found["aggregate"])


def test_separate_alignment_learns_from_independent_starts_with_clipping_and_noise():
    private = DifferentialPrivacyServerSideFixedClipping(FedAvg(fraction_evaluate=0.0), 1e-3, 20.0, 5)
    strategy = c2m3(private, alignment="separate")
    grid = SerialGrid(digits_app(independent=True, epochs=5), 5)
    result = strategy.start(grid, from_params(mlp().state_dict()), num_rounds=4)
    assert accuracy(mlp, result.arrays) > 0.8


def test_noise_that_clients_add_themselves_survives_a_joint_match():
    """What a client does to its own reply is done before the server sees it: aligning it is post-processing."""
    app, noisy = digits_app(independent=True, epochs=5), ClientApp(mods=[])
    mod = LocalDpMod(clipping_norm=50.0, sensitivity=1e-3, epsilon=10.0, delta=1e-5)

    @noisy.train(mods=[mod])
    def fit(message, context):
        return app(message, context)

    strategy = c2m3(FedAvg(fraction_evaluate=0.0))
    result = strategy.start(SerialGrid(noisy, 5), from_params(mlp().state_dict()), num_rounds=2)
    assert [metrics["c2m3-replies"] for metrics in result.train_metrics_clientapp.values()] == [5, 5]
    assert accuracy(mlp, result.arrays) > 0.8


def test_a_separately_aligned_reply_does_not_depend_on_the_other_clients():
    """The whole point: exchanging one client changes its own aligned reply and no other."""
    sent = clients(6)[5]
    kept = {}
    for other in (2, 3):
        strategy = c2m3(alignment="separate")
        send(strategy, sent)
        trained = clients(6)
        params = [shuffled(strategy.setup.spec, trained[0], 1), trained[1], trained[other]]
        weights = [10.0, 20.0, 30.0]
        kept[other] = strategy.setup.aligner.align([0, 1, other], params, weights, sent).params[:2]
    for left, right in zip(kept[2], kept[3], strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_jointly_aligned_reply_does_depend_on_them():
    sent = mlp(99).state_dict()
    kept = []
    for other in (2, 3):
        strategy = c2m3()
        params = [clients(6)[0], clients(6)[1], clients(6)[other]]
        kept.append(strategy.setup.aligner.align([0, 1, 2], params, [1.0] * 3, sent).params[0])
    assert any(not torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_separate_alignment_never_moves_a_reply_away_from_the_sent_model():
    """So a clipped update is still clipped after it was aligned."""
    strategy = c2m3(alignment="separate")
    sent = mlp().state_dict()
    params = clients(5)
    aligned = strategy.setup.aligner.align(list(range(5)), params, [1.0] * 5, sent).params

    def distance(reply_params):
        return sum(float((reply_params[name] - value).square().sum()) for name, value in sent.items())

    for before, after in zip(params, aligned, strict=True):
        assert distance(after) <= distance(before) * (1 + 1e-6)


def test_separate_alignment_still_undoes_a_shuffle():
    strategy = c2m3(alignment="separate")
    (model,) = clients(1)
    send(strategy, model)
    replies = [reply(node, shuffled(strategy.setup.spec, model, seed=node)) for node in range(3)]
    arrays, _ = strategy.aggregate_train(1, replies)
    for name, value in to_params(arrays).items():
        torch.testing.assert_close(value, model[name])
