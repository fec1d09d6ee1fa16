from __future__ import annotations

import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.serial_grid import SerialGrid
from simulations.client_app import build_app
from simulations.models import build_model
from simulations.settings import Settings
from simulations.task_vectors import TaskAverage, Ties, ties

SETTINGS = Settings(hidden_widths="8", clients=3, partition="iid", train_size=300, initialisation="shared")
MODEL = build_model(SETTINGS, (1, 8, 8), 10, seed=0)
EVERYONE = {"fraction_evaluate": 0.0, "min_train_nodes": 3, "min_available_nodes": 3}


def _after_a_round(strategy, change):
    app = build_app(
        lambda each: ({name: value + change(each.client, value) for name, value in each.params.items()}, 0.0)
    )
    grid = SerialGrid(app, SETTINGS.clients, run_config=SETTINGS.to_run_config())
    return to_params(strategy.start(grid, from_params(MODEL.state_dict()), 1).arrays)


def _noise(client, value):
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(client))


def test_with_equal_numbers_of_examples_the_task_average_is_fedavg():
    found, plain = (_after_a_round(kind(**EVERYONE), _noise) for kind in (TaskAverage, FedAvg))
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value)


def test_ties_adds_its_vector_to_the_model_that_was_sent():
    found = _after_a_round(Ties(**EVERYONE), _noise)
    names = list(MODEL.state_dict())
    vectors = torch.stack(
        [torch.cat([_noise(client, MODEL.state_dict()[name]).flatten() for name in names]) for client in range(3)]
    )
    moved = torch.cat([(found[name] - MODEL.state_dict()[name]).flatten() for name in names])
    torch.testing.assert_close(moved, ties(vectors, 0.2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [TaskAverage, Ties])
def test_clients_that_learnt_nothing_change_nothing(kind):
    found = _after_a_round(kind(**EVERYONE), lambda _client, value: torch.zeros_like(value))
    for name, value in MODEL.state_dict().items():
        torch.testing.assert_close(found[name], value)


def test_untrimmed_vectors_whose_signs_agree_are_averaged():
    vectors = torch.tensor([[1.0, -2.0, 3.0], [3.0, -4.0, 5.0]])
    assert torch.equal(ties(vectors, 1.0), vectors.mean(0))


def test_entries_against_the_heavier_sign_are_left_out_and_zeros_do_not_count():
    """The sign of the sum wins, not the larger number of votes; the mean is over those that have it."""
    vectors = torch.tensor([[5.0, 1.0], [-1.0, 0.0], [-2.0, 3.0]])
    assert torch.equal(ties(vectors, 1.0), torch.tensor([5.0, 2.0]))


def test_only_the_largest_share_of_a_vector_is_kept():
    vectors = torch.tensor([[9.0, 1.0, -2.0, 3.0, 0.5]])
    assert torch.equal(ties(vectors, 0.4), torch.tensor([9.0, 0.0, 0.0, 3.0, 0.0]))


def test_ties_of_one_task_is_its_trimmed_vector_and_does_not_depend_on_the_order_of_tasks():
    vectors = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ties(vectors, 0.3), ties(vectors.flip(0), 0.3))
    assert (ties(vectors[:1], 0.3) != 0).sum() == 15
