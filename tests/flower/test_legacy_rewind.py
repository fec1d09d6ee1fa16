"""One huge reply costs a legacy strategy its reply, and no later round."""

from __future__ import annotations

import pytest
import torch
from flwr.server.client_manager import SimpleClientManager
from flwr.server.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi

from c2m3_fl.flower.legacy import C2M3
from tests.flower.federation import EXAMPLE, clients, mlp
from tests.flower.legacy_federation import Local, fit_result, parameters_of

START = parameters_of(mlp().state_dict())


def rounds(strategy, faulty):
    """Three rounds; in the second one node 3 sends `faulty`, or nothing."""
    manager, parameters, found = SimpleClientManager(), START, []
    for index in range(2):
        manager.register(Local(index, 2))
    for number in (1, 2, 3):
        strategy.configure_fit(number, parameters, manager)
        sent = {
            node: {k: v + 0.001 * number for k, v in each.items()}
            for node, each in enumerate(clients(4, independent=False))
        }
        sent |= {3: faulty} if number == 2 else {}
        results = [fit_result(node, each) for node, each in sent.items() if each is not None]
        parameters, metrics = strategy.aggregate_fit(number, results, [])
        found.append((parameters.tensors, metrics["c2m3-kept-previous"]))
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedAdam(initial_parameters=START),
        lambda: FedYogi(initial_parameters=START),
        lambda: FedAdagrad(initial_parameters=START),
        lambda: FedAvgM(initial_parameters=START, server_momentum=0.9),
    ],
    ids=["FedAdam", "FedYogi", "FedAdagrad", "FedAvgM"],
)
def test_one_huge_reply_does_not_freeze_a_legacy_strategy(make):
    huge = {name: torch.full_like(value, 1e30) for name, value in mlp().state_dict().items()}
    found, expected = (rounds(C2M3(make(), model=mlp(), example_inputs=EXAMPLE), faulty) for faulty in (huge, None))
    assert [kept for _, kept in found] == [0, 0, 0]
    assert [tensors for tensors, _ in found] == [tensors for tensors, _ in expected]
