"""Refit from clients: what a server would solve that holds all data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from c2m3_fl.flower.client_refit import ClientRefit, RegMean, refit_by_clients
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.merging.recalibrate.held_out import held_out
from c2m3_fl.network.calibration import load_batches
from c2m3_fl.network.program import export_program
from tests.flower.client_refits import ALL, NODES, WEIGHTS, app_of, convolutional, networks, normed, outputs, refit
from tests.flower.federation import EXAMPLE, digits, mlp, pooled, train


def rows_of(layer, inputs):
    """What a layer's weight multiplies, shape (groups, rows, inputs), position by position."""
    if isinstance(layer, nn.Linear):
        return inputs[None]
    patches = functional.unfold(inputs, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    patches = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return patches.reshape(len(patches), layer.groups, -1).movedim(1, 0)


def flat(outputs):
    return outputs.movedim(1, -1).reshape(-1, outputs.shape[1])


@torch.no_grad()
def by_a_server_with_all_data(make, endpoints, merged, strengths):
    """Layer by layer, from the rows themselves: every client's network on its own share, weighted least squares."""
    model, own = make().double().eval(), [make().double().eval() for _ in endpoints]
    model.load_state_dict({name: value.double() for name, value in merged.items()})
    data = pooled(NODES)
    masks = [held_out(load_batches([(x, y)]), 5)[0] for x, y in zip(data, labels_of(data), strict=True)]
    for network, params in zip(own, endpoints, strict=True):
        network.load_state_dict({name: value.double() for name, value in params.items()})
    ours, theirs = [x.double() for x in data], [x.double() for x in data]
    for index, layer in enumerate(model):
        theirs = [network[index](x) for network, x in zip(own, theirs, strict=True)]
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            _solve(layer, ours, theirs, masks, strengths)
        ours = [layer(x) for x in ours]
    return model.float().state_dict()


def labels_of(data):
    images, labels = digits()
    return [labels[[int((images == x).all(1).nonzero()[0]) for x in part]] for part in data]


def _solve(layer, ours, theirs, masks, strengths):
    x = [rows_of(layer, each) for each in ours]
    y = [flat(each) for each in theirs]
    held = [mask.repeat_interleave(len(each) // len(mask)) for mask, each in zip(masks, y, strict=True)]
    mass = torch.cat(
        [torch.full((len(e),), w / sum(WEIGHTS) / len(e)).double() for w, e in zip(WEIGHTS, y, strict=True)]
    )
    x, y, held = torch.cat(x, 1), torch.cat(y), torch.cat(held)
    mean = (mass[:, None] * y).sum(0)
    std = (mass[:, None] * (y - mean).square()).sum(0).sqrt()
    weight, groups = layer.weight.data.reshape(len(layer.weight), -1), len(x)
    chunks, targets = weight.chunk(groups), y.chunk(groups, 1)

    def solved(rows, strength):
        found = []
        for part, old, target in zip(x, chunks, targets, strict=True):
            w = mass[rows] / mass[rows].sum()
            a, r = part[rows], (target - part @ old.T)[rows]
            a, r = a - w @ a, r - w @ r
            ridge = strength * (w[:, None] * a.square()).sum(0).mean()
            system = torch.cat([w.sqrt()[:, None] * a, ridge.sqrt() * torch.eye(a.shape[1]).double()])
            right = torch.cat([w.sqrt()[:, None] * r, torch.zeros(a.shape[1], r.shape[1]).double()])
            found.append(old + torch.linalg.lstsq(system, right).solution.T)
        return found

    def error(matrices):
        total = 0.0
        for part, new, target, spread in zip(x, matrices, targets, std.chunk(groups), strict=True):
            train = mass[~held] / mass[~held].sum()
            left = target - part @ new.T
            left = left - train @ left[~held]
            share_of = mass[held] / mass[held].sum()
            total += float(((share_of[:, None] * left[held].square()).sum(0) / spread.square()).sum())
        return total

    errors = {strength: error(solved(~held, strength)) for strength in strengths}
    best = min(errors, key=errors.get)
    everything = torch.ones_like(held)
    new = solved(everything, best) if errors[best] < error(list(chunks)) * (1 - 1e-3) else list(chunks)
    fitted = torch.cat([part @ each.T for part, each in zip(x, new, strict=True)], 1)
    middle = (mass[:, None] * fitted).sum(0)
    scale = std / (mass[:, None] * (fitted - middle).square()).sum(0).sqrt()
    layer.weight.data = (torch.cat(new) * scale[:, None]).reshape(layer.weight.shape)
    layer.bias.data = mean - scale * middle


@pytest.mark.parametrize("make", [mlp, convolutional])
def test_it_is_the_solve_of_a_server_that_runs_each_network_on_its_clients_share(make):
    found, merged = refit(make)
    expected = by_a_server_with_all_data(make, *networks(make), ALL.strengths)
    data = digits()[0]
    one, other, before = (outputs(make, each, data) for each in (found.state_dict, expected, merged))
    assert (one - other).norm() <= 1e-5 * other.norm()
    assert (before - other).norm() > 0.1 * other.norm()
    assert {report.fit.strength for report in found.report.operators if report.fit} != {math.inf}


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
