"""What one client sends decides neither what the server's data make of the others' networks nor whether they do."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from flwr.serverapp.strategy import FedAvg, FedMedian, QFedAvg

from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.queries.repair import ClientStatistics
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import (
    EXAMPLE,
    accuracy,
    aggregate,
    answering,
    clients,
    digits,
    digits_app,
    mlp,
    normed,
    reply,
    same,
    shuffled,
    train,
)
from tests.flower.queries.faulty_answers import FAULTS, LIAR, Faulty, arrays

DATA = [digits()[0][1200:1500]]


@cache
def with_buffers():
    found = []
    for node in range(5):
        model = normed(node)
        train(model, *(each[node:1200:5] for each in digits()), epochs=2, seed=node)
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    return found


@cache
def in_other_orders():
    spec = C2M3(model=mlp(), example_inputs=EXAMPLE).setup.spec
    return [shuffled(spec, params, node) for node, params in enumerate(clients(5, independent=False, epochs=9))]


def one_round(make, params, inner, **options):
    strategy = C2M3(inner, model=make(), judge=None, **options)
    return aggregate([reply(node, each) for node, each in enumerate(params)], strategy, make().state_dict())


@pytest.mark.parametrize("recalibrate", [None, "repair", "refit"])
@pytest.mark.parametrize("replies", [in_other_orders, lambda: clients(5, independent=False, epochs=9)])
def test_under_a_median_a_client_of_other_weights_is_not_among_the_targets(replies, recalibrate):
    params = [dict(each) for each in replies()]
    params[1] = {name: -5 * value for name, value in params[1].items()}
    plain, _ = one_round(mlp, params, FedMedian(), example_inputs=EXAMPLE)
    found, _ = one_round(mlp, params, FedMedian(), calibration=DATA, recalibrate=recalibrate)
    # the median of four networks and a stranger is not that of the four: what the four aim at may cost it a little
    assert accuracy(mlp, found) > accuracy(mlp, plain) - 0.05


def test_where_one_client_alone_moved_and_does_not_fit_nothing_is_repaired():
    params = clients(5, independent=False)
    params[1] = {name: -5 * value for name, value in params[1].items()}
    found, metrics = one_round(mlp, params, FedMedian(), calibration=DATA)
    plain, _ = one_round(mlp, params, FedMedian(), example_inputs=EXAMPLE)
    assert metrics["c2m3-share-moved"] > 0
    assert same(found, plain)


@pytest.mark.parametrize("inner", [FedMedian, FedAvg])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("1.running_mean", lambda value: value + 1e4),
        ("1.running_mean", lambda value: value - 1e4),
        ("1.running_var", lambda value: value * 1e-12),
        ("1.running_var", lambda value: value * 1e12),
    ],
)
def test_running_statistics_of_one_client_neither_refuse_the_calibration_data_nor_are_targets(name, change, inner):
    honest, _ = one_round(normed, with_buffers(), inner(), calibration=DATA)
    params = [dict(each) for each in with_buffers()]
    params[2][name] = change(params[2][name])
    found, metrics = one_round(normed, params, inner(), calibration=DATA)
    assert metrics["c2m3-repaired"]
    assert accuracy(normed, found) > accuracy(normed, honest) - 0.05


def asked(inner, nodes, transit, **options):
    """The result of one round with starts of their own in which clients answer for moments."""
    app = answering(app=digits_app(independent=True, evaluates=""))
    strategy = C2M3(inner, model=mlp(), feedback="never", **options)
    return strategy.start(SerialGrid(app, nodes, transit=transit), from_params(mlp().state_dict()), num_rounds=1)


def guarded(transit=None):
    options = {"calibration": DATA, "moments": ClientStatistics(), "head": None, "judge": None, "diagnostics": True}
    run = asked(FedAvg(fraction_evaluate=0.0), 4, transit, **options)
    return run.arrays, run.train_metrics_clientapp[1]


@pytest.mark.parametrize("fault", ["NaN", None], ids=["NaN", "silent"])
def test_where_one_client_gives_no_moments_those_of_the_others_show_a_shift(fault, caplog):
    honest, told = guarded()
    assert f"no moments from node {LIAR}" not in caplog.text
    found, metrics = guarded(Faulty(None if fault is None else FAULTS[fault]))
    assert (f"no moments from node {LIAR}" in caplog.text) == (fault is not None)
    for each in (told, metrics):
        assert each["c2m3-guard-shift"] < 0.5
        assert each["c2m3-deployed/auto"] == 1
    assert accuracy(mlp, found) > accuracy(mlp, honest) - 0.05


@pytest.mark.parametrize("endpoints", ["own", "all"])
def test_under_a_median_no_claimed_number_of_values_counts(endpoints):
    def repaired(transit=None):
        options = {"example_inputs": EXAMPLE, "calibration": ClientStatistics(endpoints), "recalibrate": "repair"}
        return to_params(asked(FedMedian(fraction_evaluate=0.0), 3, transit, **options).arrays)

    def spoil(message):
        counts = {name: value for name, value in to_params(message.content["moments"]).items() if "count" in name}
        arrays(
            lambda name, value: (
                value / counts[name.removesuffix("deviation") + "count"] * 10**6
                if name.endswith("deviation")
                else torch.full_like(value, 10**6)
                if name.endswith("count")
                else value
            )
        )(message)

    honest, claimed = repaired(), repaired(Faulty(spoil))
    for name, value in honest.items():
        torch.testing.assert_close(claimed[name], value, rtol=1e-4, atol=1e-5)


def test_under_qfedavg_which_weighs_by_losses_claimed_examples_change_no_refit():
    def refit(examples):
        strategy = C2M3(
            QFedAvg(client_learning_rate=0.1, q=0.2), model=mlp(), judge=None, calibration=DATA, recalibrate="refit"
        )
        replies = [
            reply(node, params, examples=count, metrics={"train_loss": 1.0 + node})
            for node, (params, count) in enumerate(zip(clients(3, independent=False), examples, strict=True))
        ]
        return aggregate(replies, strategy, mlp().state_dict())[0]

    assert same(refit([10, 10, 10]), refit([10, 10, 2**40]))
