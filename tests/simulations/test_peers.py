from __future__ import annotations

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from torch import nn

from c2m3_fl.core import permutation
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.queries.refit import ClientRefit
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.merging.align.methods import CycleConsistent, GitReBasin, Mean
from c2m3_fl.symmetry.discover import permutation_spec
from simulations.client_app import app, build_app
from simulations.data import federated_data
from simulations.models import build_model
from simulations.peers import AlignedBy, FisherAverage, Merged, diagonal_fisher, fisher_average
from simulations.settings import Settings
from simulations.strategies import build_strategy

SETTINGS = Settings(hidden_widths="16,16", clients=3, local_epochs=2, partition="dirichlet", alpha=0.3)
DATA = federated_data(SETTINGS)
MODEL = build_model(SETTINGS, (1, 8, 8), 10, seed=0)
EVERYONE = {"fraction_evaluate": 0.0, "min_train_nodes": 3, "min_available_nodes": 3}


def _after_a_round(strategy, client_app=app):
    grid = SerialGrid(client_app, SETTINGS.clients, run_config=SETTINGS.to_run_config())
    return to_params(strategy.start(grid, from_params(MODEL.state_dict()), 1).arrays)


def _merged(method, recalibrate="none"):
    return _after_a_round(
        Merged(model=MODEL, method=method, calibration=DATA.calibration, recalibrate=recalibrate, **EVERYONE)
    )


def _aligned(method, **options):
    inner = FedAvg(**EVERYONE)
    options = {"head": None, "judge": None, **options}
    return _after_a_round(AlignedBy(inner, model=MODEL, method=method, calibration=DATA.calibration, **options))


def _close(one, two):
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=1e-5)


def _same_outputs(one, two, tolerance):
    outputs = [torch.func.functional_call(MODEL, dict(each), DATA.held_out.inputs) for each in (one, two)]
    torch.testing.assert_close(*outputs, atol=tolerance, rtol=tolerance)


def test_without_alignment_the_merge_is_fedavg():
    plain = _after_a_round(FedAvg(**EVERYONE))
    _close(_merged(Mean()), plain)
    _close(_aligned(Mean()), plain)


@pytest.mark.parametrize("method", [GitReBasin(), CycleConsistent()])
def test_aligned_replies_are_averaged_as_merge_averages_them(method):
    found = _aligned(method)
    _close(found, _merged(method))
    assert any(not torch.allclose(found[name], value) for name, value in _merged(Mean()).items())


def test_c2m3_after_its_own_alignment_is_c2m3():
    """Up to the order of the units, which nothing outside the network sees."""
    options = {"head": "labels", "recalibrate": ClientRefit(), "judge": None}
    ours = C2M3(FedAvg(**EVERYONE), model=MODEL, example_inputs=DATA.calibration[0][:2], **options)
    _same_outputs(_after_a_round(ours), _aligned(CycleConsistent(), **options), 1e-3)


def test_a_client_in_another_order_is_brought_back():
    """Three times one network, each in an order of its own: every method of alignment finds the network again."""
    spec = permutation_spec(MODEL, DATA.calibration[0][:2])
    trained = build_model(SETTINGS, (1, 8, 8), 10, seed=1).state_dict()

    def shuffled(assignment):
        move = permutation.random(spec, torch.Generator().manual_seed(assignment.client))
        return permutation.apply(spec, move, trained), 0.0

    found = _after_a_round(
        AlignedBy(FedAvg(**EVERYONE), model=MODEL, method=GitReBasin(), calibration=DATA.calibration, head=None),
        build_app(shuffled),
    )
    _same_outputs(found, trained, 1e-5)


def test_fisher_information_of_a_softmax_is_that_of_its_closed_form():
    """For scores Wx + b: E[(∂ log p(y|x) / ∂W_ci)²] = p_c (1 - p_c) x_i²."""
    model, inputs = nn.Linear(4, 3).double(), torch.randn(40, 4, dtype=torch.float64)
    found = diagonal_fisher(model, model.state_dict(), inputs)
    probabilities = model(inputs).softmax(1).detach()
    variance = probabilities * (1 - probabilities)
    torch.testing.assert_close(found["weight"], torch.einsum("nc,ni->ci", variance, inputs.square()) / 40)
    torch.testing.assert_close(found["bias"], variance.mean(0))


def test_equal_information_gives_the_weighted_mean_and_none_the_given_value():
    nodes = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 6.0])}]
    equal = [{"a": torch.tensor([0.5, 0.0])}] * 2
    found = fisher_average(nodes, equal, [3.0, 1.0], otherwise={"a": torch.tensor([9.0, 9.0])})
    torch.testing.assert_close(found["a"], torch.tensor([1.5, 9.0]))


def test_who_alone_knows_a_parameter_decides_it():
    nodes = [{"a": torch.tensor([1.0])}, {"a": torch.tensor([3.0])}]
    known = [{"a": torch.tensor([1.0])}, {"a": torch.tensor([0.0])}]
    assert fisher_average(nodes, known, [1.0, 9.0], otherwise={"a": torch.tensor([2.8])})["a"] == 1.0


def test_the_fisher_average_of_a_federation_differs_from_the_mean_and_has_its_shapes():
    plain, found = _after_a_round(FedAvg(**EVERYONE)), _after_a_round(FisherAverage(**EVERYONE))
    assert [(name, value.shape) for name, value in found.items()] == [(n, v.shape) for n, v in plain.items()]
    assert any(not torch.allclose(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    "name", ["git-rebasin", "mergemany", "activations", "cca", "fisher", "regmean", "c2m3+regmean"]
)
def test_identical_clients_keep_their_function_under_every_peer(name):
    same = build_model(SETTINGS, (1, 8, 8), 10, seed=1).state_dict()
    found = _after_a_round(build_strategy(name, MODEL, DATA), build_app(lambda _: (same, 0.0)))
    _same_outputs(found, same, 1e-4)
