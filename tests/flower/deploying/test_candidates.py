"""What is deployed, through the strategy: head, refit and judgement, from the first message to the result."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, Strategy

from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.queries.head import Head, head_by_clients
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
    digits,
    digits_app,
    mlp,
    reply,
    same,
)
from tests.flower.interrupted import Killed, comparable
from tests.flower.interrupted import run as interrupted

NODES = 4
HELD = [tuple(each[1200:1400] for each in digits())]
REFIT = ClientRefit(first_layer=True)
OPTIONS = {
    "head": ({"head": "labels", "judge": None}, "head"),
    "refit": ({"recalibrate": REFIT, "judge": None}, "client-refit"),
    "both": ({"recalibrate": REFIT, "head": "labels", "judge": None}, "client-refit+head"),
    "judged by clients": ({"head": "labels", "judge": "clients"}, "head"),
    "judged by labels": ({"head": "labels", "judge": "labels", "calibration": HELD}, "head"),
}


def app(**options):
    return answering(app=digits_app(**{"epochs": 1, "rate": 0.02, "evaluates": "loss", **options}), first_layer=True)


def played(options, *, rounds=2, clients_app=None, seen=None, transit=None, fraction=0.75):
    """A federation of three in four clients a round; the strategy, the result and the random numbers after it."""

    def heard(replies):
        for each in replies if seen is not None else ():
            seen.append((each.metadata.message_type, each.metadata.src_node_id))
        return replies if transit is None else transit(replies)

    random.seed(5)
    np.random.seed(5)  # noqa: NPY002  # the state that clients' code may draw from
    torch.manual_seed(5)
    strategy = C2M3(
        FedAvg(fraction_train=fraction, fraction_evaluate=0.0),
        model=mlp(),
        diagnostics=True,
        **{"example_inputs": EXAMPLE, **options},
    )
    result = strategy.start(
        SerialGrid(clients_app or app(), NODES, transit=heard), from_params(mlp().state_dict()), num_rounds=rounds
    )
    drawn = random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002  # as above
    return strategy, result, drawn


def deployed(result, current):
    """The candidates of a round, the chosen one first."""
    found = {
        key.removeprefix("c2m3-deployed/"): value
        for key, value in result.train_metrics_clientapp[current].items()
        if key.startswith("c2m3-deployed/")
    }
    assert sum(found.values()) in (0, 1)
    return sorted(found, key=lambda name: -found[name])


@pytest.mark.parametrize(("options", "expected"), OPTIONS.values(), ids=OPTIONS.keys())
def test_whatever_is_deployed_the_trajectory_and_every_draw_are_those_without(options, expected):
    plain, before, draws = played({"judge": None})
    strategy, result, drawn = played(options)
    assert same(strategy.trajectory, plain.trajectory)
    assert same(plain.trajectory, before.arrays)
    assert drawn == draws
    chosen, *others = deployed(result, 2)
    assert chosen == expected
    assert not same(result.arrays, plain.trajectory)
    assert "aggregate" in others
    assert accuracy(mlp, result.arrays) >= accuracy(mlp, before.arrays) - 0.01


def test_the_head_is_fitted_to_what_the_refit_network_computes():
    both = {"recalibrate": REFIT, "judge": None}
    strategy, refit, _ = played(both, rounds=1)
    _, result, _ = played({**both, "head": "labels"}, rounds=1)
    assert len(refit.train_metrics_clientapp[1]["c2m3-nodes"]) == NODES - 1  # all of them answer for the head
    grid, every = SerialGrid(app(), NODES), list(range(1, NODES + 1))
    found = head_by_clients(Head(), grid, every, strategy.setup.data.program, to_params(refit.arrays))
    for name, value in found.state_dict.items():
        torch.testing.assert_close(to_params(result.arrays)[name], value, rtol=1e-4, atol=1e-5)


def garbage(replies):
    """Every answer to a query is empty."""
    for each in replies:
        if each.metadata.message_type.startswith("query"):
            each.content = RecordDict()
    return replies


@pytest.mark.parametrize("judge", [None, "auto"])
def test_candidates_that_fail_leave_the_aggregate_and_the_run_goes_on(judge):
    options = {"recalibrate": REFIT, "head": "labels", "judge": judge, "deploy": "every"}
    strategy, result, _ = played(options, transit=garbage)
    assert [metrics["c2m3-failed-candidates"] for metrics in result.train_metrics_clientapp.values()] == [2, 2]
    assert deployed(result, 2) == ["aggregate"]
    assert same(result.arrays, strategy.trajectory)


@pytest.mark.parametrize(("deploy", "asking"), [("last", [4]), ("every", [1, 2, 3, 4]), (3, [3, 4])])
@pytest.mark.parametrize("resumable", [False, True])
def test_deploy_says_in_which_rounds_clients_are_asked(deploy, asking, resumable, tmp_path):
    seen, current = [], [0]

    def heard(replies):
        kinds = {each.metadata.message_type for each in replies}
        current[0] += "train" in kinds
        seen.extend(current if any(kind.startswith("query") for kind in kinds) else [])
        return replies

    strategy = C2M3(
        FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE, head="labels", judge=None, deploy=deploy
    )
    outer = Resumable(strategy, tmp_path) if resumable else strategy
    outer.start(SerialGrid(app(), 2, transit=heard), from_params(mlp().state_dict()), num_rounds=4)
    assert sorted(set(seen)) == asking


@pytest.mark.parametrize("name", ["head", "refit", "both"])
def test_where_the_last_round_keeps_the_previous_model_its_trajectory_is_deployed(name):
    """As it would have been in the round before."""
    current = [0]

    def last_round_lost(replies):
        current[0] += any(each.metadata.message_type == "train" for each in replies)
        return [each for each in replies if current[0] < 2 or each.metadata.message_type != "train"]

    options, chosen = OPTIONS[name]
    _, expected, _ = played(options, rounds=1, fraction=1.0)
    strategy, result, _ = played(options, transit=last_round_lost, fraction=1.0)
    assert result.train_metrics_clientapp[2]["c2m3-kept-previous"] == 1
    assert deployed(result, 2)[0].removeprefix("returned+") == chosen
    assert same(result.arrays, expected.arrays)
    assert not same(result.arrays, strategy.trajectory)


RESUMED = {
    "head": {"head": "labels"},
    "refit, judged": {"recalibrate": REFIT, "judge": "clients"},
    "by default": {"calibration": calibration()},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED.keys())
def test_a_run_that_asks_clients_and_was_killed_ends_like_one_that_was_not(options, tmp_path):
    def make(folder):
        strategy = C2M3(
            FedAvg(fraction_train=0.6, fraction_evaluate=0.0),
            model=mlp(),
            **{"example_inputs": EXAMPLE, "deploy": 2, **options},
        )
        return Resumable(strategy, tmp_path / folder)

    random.seed(0)
    whole = interrupted(make("whole"), mlp, rounds=3, app=app(independent=True))
    random.seed(0)
    with pytest.raises(Killed):
        interrupted(make("halves"), mlp, killed_in=3, rounds=3, app=app(independent=True))
    random.seed(12345)
    resumed = interrupted(make("halves"), mlp, rounds=3, app=app(independent=True))
    assert same(resumed.arrays, whole.arrays)
    assert comparable(resumed.train_metrics_clientapp) == comparable(whole.train_metrics_clientapp)
    assert any(key.startswith("c2m3-judge-loss/") for key in whole.train_metrics_clientapp[3])


@pytest.mark.parametrize(
    "options", [{"calibration": calibration(), "recalibrate": "repair"}, {"recalibrate": REFIT, "judge": None}]
)
def test_under_a_strategy_that_ignores_weights_claims_change_nothing_that_is_deployed(options):
    def once(claims):
        strategy = C2M3(FedMedian(fraction_evaluate=0.0), model=mlp(), **{"example_inputs": EXAMPLE, **options})
        grid = SerialGrid(app(), 3)
        list(strategy.configure_train(1, from_params(mlp().state_dict()), ConfigRecord(), grid))
        replies = [reply(node + 1, params, examples=claim) for node, (params, claim) in enumerate(claims)]
        arrays, metrics = strategy.aggregate_train(1, replies)
        assert metrics["c2m3-repaired"] == 1
        return to_params(arrays)

    nodes = clients(3)
    honest, boasting = (once(list(zip(nodes, claims, strict=True))) for claims in ([10, 10, 10], [10, 10, 2**40]))
    for name, value in honest.items():
        torch.testing.assert_close(boasting[name], value, rtol=1e-4, atol=1e-5)


def evaluations(seen):
    return sum(kind == "evaluate" for kind, _ in seen)


def test_by_default_the_clients_judge_once_what_the_server_made():
    options = {"calibration": calibration()}
    seen = []
    strategy, result, _ = played(options, seen=seen)
    plain, *_ = played({**options, "judge": None})
    metrics = result.train_metrics_clientapp[2]
    assert set(deployed(result, 2)) == {"aggregate", "repair", "refit", "head", "refit+head", "previous"}
    asked = [key for key in metrics if key.startswith("c2m3-judge-voters/")]
    assert len(asked) >= 3
    assert evaluations(seen) == NODES * len(asked) + NODES * 6  # the candidates, then the best at six temperatures
    assert not any(key.startswith("c2m3-judge") for key in result.train_metrics_clientapp[1])
    assert metrics[f"c2m3-judge-chosen/{deployed(result, 2)[0]}"] == 1
    assert same(strategy.trajectory, plain.trajectory)
    prefix = "c2m3-judge-robust-gain/"
    gains = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    best = max(gains, key=gains.__getitem__)
    assert deployed(result, 2)[0] == (best if gains[best] > 0 else "aggregate")


@pytest.mark.parametrize("evaluates", ["accuracy", ""])
@pytest.mark.parametrize("options", [{"calibration": calibration()}, {"recalibrate": REFIT, "head": "labels"}])
def test_where_clients_cannot_judge_the_rule_below_decides_and_that_is_said_once(evaluates, options, caplog):
    options = {**options, "deploy": "every"}
    runs = [
        played({**options, **more}, clients_app=app(independent=True, evaluates=evaluates))
        for more in ({}, {"judge": None})
    ]
    (_, found, drawn), (_, expected, draws) = runs
    assert same(found.arrays, expected.arrays)
    assert drawn == draws
    told = [text for text in caplog.messages if "the clients do not judge" in text]
    assert len(told) == 1
    assert "judge_key" in told[0]
    assert [deployed(each, 1)[0] for each in (found, expected)] == [deployed(expected, 1)[0]] * 2


SILENT = {
    "nothing to judge": {"head": None},
    "a recalibration by name": {"calibration": calibration(), "recalibrate": "repair"},
    "labels decide": {"calibration": HELD},
    "nobody": {"calibration": calibration(), "head": "labels", "judge": None},
}


@pytest.mark.parametrize("options", SILENT.values(), ids=SILENT.keys())
def test_no_client_is_asked_to_judge_where_other_evidence_decides_or_nothing_is_to_be_decided(options):
    seen = []
    played(options, seen=seen)
    assert evaluations(seen) == 0


def test_an_explicit_judge_compares_what_was_asked_for_by_name_with_the_aggregate():
    seen = []
    _, result, _ = played({"calibration": calibration(), "recalibrate": "repair", "judge": "clients"}, seen=seen)
    assert evaluations(seen) >= 2 * NODES
    assert result.train_metrics_clientapp[2]["c2m3-judge-voters/repair"] == NODES


class Around(Strategy):
    """A wrapper that hands the callbacks on, and no number of rounds."""

    configure_train = aggregate_train = configure_evaluate = aggregate_evaluate = summary = None

    def __init__(self, inside):
        for name in Strategy.__abstractmethods__:
            setattr(self, name, getattr(inside, name))


def test_where_the_number_of_rounds_is_unknown_every_round_asks_and_that_is_said_once(caplog):
    seen = []
    strategy = C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE, head="labels", judge=None)
    grid = SerialGrid(
        app(), 2, transit=lambda replies: seen.extend(each.metadata.message_type for each in replies) or replies
    )
    Around(strategy).start(grid, from_params(mlp().state_dict()), num_rounds=2)
    after = "".join("t" if kind == "train" else "q" for kind in seen).split("tt")
    assert [bool(asked) for asked in after] == [False, True, True]
    assert sum("the number of rounds is unknown" in text for text in caplog.messages) == 1
