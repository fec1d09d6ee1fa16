"""Before a residual addition the last summand may be fitted to the own sum without the merged skip."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from c2m3_fl.flower.queries.refit import ClientRefit, refit_by_clients
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.merging.recalibrate.from_clients import packing, plan, sums
from c2m3_fl.network.program import export_program
from tests.flower.federation import EXAMPLE, digits, train
from tests.flower.queries.refits import app_of

CLIENTS = 5
TO_THE_SUM = "refit to the own sum without the merged skip"


class Residual(nn.Module):
    """Two residual blocks between two linear layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(2))

    def features(self, x):
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = x + block(x)
        return x

    def forward(self, x):
        return self.head(self.features(x))


def make(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Residual().eval()


def by_class():
    images, labels = (each[:1200] for each in digits())
    return [(images[labels // 2 == part], labels[labels // 2 == part]) for part in range(CLIENTS)]


def refit(endpoints, merged):
    """Refit without the first layer, so that the skip stays as the average has it; and what was done to operators."""
    program = export_program(make(), EXAMPLE)
    grid = SerialGrid(app_of(make, lambda context: [by_class()[int(context.node_config["partition-id"])]]), CLIENTS)
    found = refit_by_clients(ClientRefit(), grid, [1, 2, 3, 4, 5], program, merged, endpoints, [1.0] * CLIENTS)
    return found.state_dict, [report.action for report in found.report.operators if report.fit]


def without_the_sum(monkeypatch, *given):
    with monkeypatch.context() as patch:
        for module in (plan, packing, sums):
            patch.setattr(module, "skip_beside", lambda *_: None)
        return refit(*given)


def average(endpoints):
    return {name: sum(each[name] for each in endpoints) / len(endpoints) for name in endpoints[0]}


@torch.no_grad()
def distance(params, endpoints):
    """Mean square distance of the features from those of every client's own network on its own data."""
    total = 0.0
    for own, (images, _) in zip(endpoints, by_class(), strict=True):
        ours, theirs = make(), make()
        ours.load_state_dict(params)
        theirs.load_state_dict(own)
        total += float((ours.features(images) - theirs.features(images)).square().mean())
    return total / CLIENTS


def mixed(blocks, stem):
    """The network with the blocks and the head of one seed and the first layer of another."""
    return {
        **make(blocks).state_dict(),
        **{f"stem.{name}": value for name, value in make(stem).stem.state_dict().items()},
    }


def test_where_the_skip_is_off_the_sum_is_the_target_and_comes_nearer(monkeypatch):
    endpoints = [mixed(blocks=0, stem=seed) for seed in range(CLIENTS)]
    merged = average(endpoints)
    (found, actions), (other, plain) = refit(endpoints, merged), without_the_sum(monkeypatch, endpoints, merged)
    assert actions.count(TO_THE_SUM) == 2
    assert TO_THE_SUM not in plain
    assert distance(found, endpoints) < 0.8 * min(distance(other, endpoints), distance(merged, endpoints))


def test_where_the_skip_is_right_both_targets_are_one(monkeypatch):
    endpoints = [mixed(blocks=seed, stem=0) for seed in range(CLIENTS)]
    merged = average(endpoints)
    (found, _), (other, _) = refit(endpoints, merged), without_the_sum(monkeypatch, endpoints, merged)
    assert distance(found, endpoints) == pytest.approx(distance(other, endpoints), rel=1e-3)
    assert distance(found, endpoints) < 0.5 * distance(merged, endpoints)


@pytest.mark.slow
def test_features_come_nearer_on_digits_with_two_classes_a_client(monkeypatch):
    """Three local epochs from a shared start.

    Over seeds 0 to 7 the distance falls by 16 to 25 percent. Accuracy moves by -.012 to .011, .000 on average, because
    the last layer makes up for much of the distance.
    """
    endpoints = []
    for number, part in enumerate(by_class()):
        model = make()
        train(model, *part, epochs=3, seed=number, rate=0.05)
        endpoints.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    merged = average(endpoints)
    (found, actions), (other, _) = refit(endpoints, merged), without_the_sum(monkeypatch, endpoints, merged)
    assert actions.count(TO_THE_SUM) == 2
    assert distance(found, endpoints) < 0.9 * distance(other, endpoints)
