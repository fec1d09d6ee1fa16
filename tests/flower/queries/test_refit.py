"""Refit from clients: what a server would solve that holds all data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from c2m3_fl.flower.queries.refit import ClientRefit, RegMean, refit_by_clients
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.network.program import export_program
from tests.flower.federation import EXAMPLE, digits, mlp, pooled, train
from tests.flower.queries.refits import (
    ALL,
    NODES,
    WEIGHTS,
    app_of,
    convolutional,
    dropping,
    networks,
    normed,
    outputs,
    pooling,
    refit,
    statistical,
)
from tests.flower.queries.server_solve import refit_on_a_server


@torch.no_grad()
def by_a_server_with_all_data(make, endpoints, merged, strengths):
    """Every client's network on its own share."""
    own = []
    for params in endpoints:
        own.append(make().double().eval())
        own[-1].load_state_dict({name: value.double() for name, value in params.items()})
    model = make().double().eval()
    model.load_state_dict({name: value.double() for name, value in merged.items()})
    shares = list(zip(pooled(NODES), labels_of(pooled(NODES)), strict=True))
    return refit_on_a_server(model, own, shares, WEIGHTS, strengths).float().state_dict()


def labels_of(data):
    images, labels = digits()
    return [labels[[int((images == x).all(1).nonzero()[0]) for x in part]] for part in data]


@pytest.mark.parametrize("make", [mlp, convolutional])
def test_it_is_the_solve_of_a_server_that_runs_each_network_on_its_clients_share(make):
    found, merged = refit(make)
    expected = by_a_server_with_all_data(make, *networks(make), ALL.strengths)
    data = digits()[0]
    one, other, before = (outputs(make, each, data) for each in (found.state_dict, expected, merged))
    assert (one - other).norm() <= 1e-5 * other.norm()
    assert (before - other).norm() > 0.1 * other.norm()
    assert {report.fit.strength for report in found.report.operators if report.fit} != {math.inf}


@pytest.mark.parametrize("make", [statistical, pooling])
def test_a_batch_norm_behind_no_linear_operator_takes_the_statistics_of_a_server_with_all_data(make):
    found, merged = refit(make)
    expected = by_a_server_with_all_data(make, *networks(make), ALL.strengths)
    names = [name for name in merged if "running" in name]
    for name in names:
        torch.testing.assert_close(found.state_dict[name], expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(merged[name], expected[name], rtol=0.1)
    data = torch.cat(pooled(NODES))
    one, other = (outputs(make, each, data) for each in (found.state_dict, expected))
    assert (one - other).norm() <= 1e-5 * other.norm()
    restated = [report for report in found.report.operators if report.action == "running statistics"]
    assert len(restated) == len(names) / 2


def test_both_networks_run_without_dropout():
    assert dropping().training
    found, merged = refit(dropping)
    expected = by_a_server_with_all_data(dropping, *networks(dropping), ALL.strengths)
    one, other, before = (outputs(dropping, each, digits()[0]) for each in (found.state_dict, expected, merged))
    assert (one - other).norm() <= 1e-5 * other.norm()
    assert (before - other).norm() > 0.1 * other.norm()


@pytest.mark.parametrize("make", [mlp, convolutional, normed])
@pytest.mark.parametrize("double", [False, True])
def test_identical_networks_stay_what_they_are(make, double):
    options = ClientRefit(double=double, first_layer=True)
    found, merged = refit(make, options, alike=True)
    data = digits()[0]
    before, after = outputs(make, merged, data), outputs(make, found.state_dict, data)
    assert (after - before).norm() <= (1e-5 if double else 1e-4) * before.norm()


@pytest.mark.parametrize("make", [mlp, convolutional])
def test_the_network_of_a_single_client_stays_what_it_is(make):
    endpoints, _ = networks(make)
    program, grid = export_program(make(), EXAMPLE), SerialGrid(app_of(make), 1)
    found = refit_by_clients(ALL, grid, [1], program, endpoints[0], endpoints[:1], [5.0]).state_dict
    torch.testing.assert_close(
        outputs(make, found, EXAMPLE), outputs(make, endpoints[0], EXAMPLE), rtol=1e-5, atol=1e-5
    )


def test_behind_batch_norm_the_moments_are_those_of_the_own_networks():
    found, _ = refit(normed)
    endpoints, _ = networks(normed)
    merged, own, weights = [], [], torch.tensor(WEIGHTS).double() / sum(WEIGHTS)
    for params, part in zip(endpoints, pooled(NODES), strict=True):
        merged.append(outputs(lambda: normed()[:3], head_of(found.state_dict), part).double())
        own.append(outputs(lambda: normed()[:3], head_of(params), part).double())
    for kind in (mean_of, square_of):
        torch.testing.assert_close(kind(merged, weights), kind(own, weights), rtol=1e-4, atol=1e-5)


def test_behind_other_norms_the_moments_are_those_of_the_mixture_of_the_own_networks():
    found, _ = refit(normed)
    endpoints, _ = networks(normed)
    weights, parts = torch.tensor(WEIGHTS).double() / sum(WEIGHTS), pooled(NODES)
    merged = [_features(found.state_dict, part) for part in parts]
    own = [_features(params, part) for params, part in zip(endpoints, parts, strict=True)]
    mean, target = (sum(w * each.mean(0) for w, each in zip(weights, side, strict=True)) for side in (merged, own))
    torch.testing.assert_close(mean, target, rtol=1e-3, atol=1e-3)
    merged, own = (
        sum(w * (each - middle).square().mean(0) for w, each in zip(weights, side, strict=True))
        for side, middle in ((merged, mean), (own, target))
    )
    torch.testing.assert_close(merged, own, rtol=1e-3, atol=1e-3)


def _features(params, part):
    """What the LayerNorm gives."""
    return outputs(lambda: normed()[:9], {n: v for n, v in params.items() if n[0] != "9"}, part).double()


class Twice(nn.Module):
    """One layer that is used twice, and two layers of one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.one, self.other, self.last = (nn.Linear(64, 64) for _ in range(5))
        self.other.weight = self.one.weight

    def forward(self, images):
        hidden = torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.first(images))))))
        return self.last(torch.relu(self.other(torch.relu(self.one(hidden)))))


def twice(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Twice()


def test_operators_that_are_used_twice_and_tied_weights_are_left_alone_and_reported():
    found, merged = refit(twice)
    skipped = dict(found.report.skipped)
    for name in ("twice.weight", "twice.bias", "other.weight"):  # of tied weights one name is told
        assert torch.equal(found.state_dict[name], merged[name])
        assert skipped[name] == "shared by several operators"
    assert torch.equal(found.state_dict["one.weight"], merged["one.weight"])
    assert not torch.equal(found.state_dict["last.weight"], merged["last.weight"])


def head_of(params):
    return {name: value for name, value in params.items() if name[0] in "12"}


def mean_of(parts, weights):
    return sum(w * each.mean((0, 2, 3)) for w, each in zip(weights, parts, strict=True))


def square_of(parts, weights):
    return sum(w * each.square().mean((0, 2, 3)) for w, each in zip(weights, parts, strict=True))


def test_batch_norm_statistics_are_the_moments_of_its_inputs():
    found = refit(normed)[0].state_dict
    rows = [outputs(lambda: normed()[:2], {"1.weight": found["1.weight"]}, part).double() for part in pooled(NODES)]
    weights = torch.tensor(WEIGHTS).double() / sum(WEIGHTS)
    mean = mean_of(rows, weights)
    torch.testing.assert_close(found["2.running_mean"].double(), mean, rtol=1e-4, atol=1e-5)
    variance = square_of(rows, weights) - mean.square()
    torch.testing.assert_close(found["2.running_var"].double(), variance, rtol=1e-4, atol=1e-5)


def test_the_order_of_the_answers_does_not_matter():
    one, other = (refit(mlp, transit=order)[0].state_dict for order in (list, lambda replies: replies[::-1]))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weights_do_not_count_for_strategies_that_ignore_them():
    endpoints, merged = networks(mlp)
    program, grid = export_program(mlp(), EXAMPLE), SerialGrid(app_of(), NODES)
    found = [
        refit_by_clients(ALL, grid, [1, 2, 3], program, merged, endpoints, weights, equally=True).state_dict
        for weights in (WEIGHTS, [1.0, 1.0, 1.0])
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_refit_helps_where_clients_have_two_classes_each():
    """Digits, five clients, a shared start, one local epoch."""
    images, labels = (each[:1200] for each in digits())
    parts = [torch.nonzero((labels == 2 * index) | (labels == 2 * index + 1))[:, 0] for index in range(5)]

    def own(context):
        part = parts[int(context.node_config["partition-id"])]
        return [(images[part], labels[part])]

    start = {name: value.clone() for name, value in mlp().state_dict().items()}
    for number in range(3):
        endpoints = [trained(start, images[part], labels[part], number) for part in parts]
        weights = [float(len(part)) for part in parts]
        start = {
            name: sum(w * each[name] for w, each in zip(weights, endpoints, strict=True)) / sum(weights)
            for name in start
        }
    program, grid = export_program(mlp(), EXAMPLE), SerialGrid(app_of(mlp, own), 5)
    before = score(start)
    for options, gain in (
        (ClientRefit(first_layer=True), 0.2),
        (ClientRefit(), 0.15),
        (RegMean(first_layer=True), 0.1),
    ):
        found = refit_by_clients(options, grid, list(range(1, 6)), program, start, endpoints, weights)
        assert score(found.state_dict) > before + gain


def trained(params, data, labels, seed):
    model = mlp()
    model.load_state_dict(params)
    train(model, data, labels, epochs=1, seed=seed)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def score(params):
    images, labels = (each[1200:] for each in digits())
    return float((outputs(mlp, params, images).argmax(1) == labels).float().mean())
