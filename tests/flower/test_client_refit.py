"""Refit from clients: what a server would solve that holds all data, and what faulty clients cost."""

from __future__ import annotations

import math

import pytest
import torch
from flwr.clientapp import ClientApp
from torch import nn
from torch.nn import functional

from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.flower.client_moments import answer_statistics
from c2m3_fl.flower.client_refit import ClientRefit, RegMean, asks_clients, price, refit_by_clients
from c2m3_fl.flower.records import from_params, to_params
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.merging.recalibrate.held_out import held_out
from c2m3_fl.network.calibration import load_batches
from c2m3_fl.network.program import export_program
from tests.flower.federation import EXAMPLE, digits, mlp, pooled, share, train

NODES, WEIGHTS = 3, [1.0, 2.0, 3.0]
ALL = ClientRefit(double=True, first_layer=True, positions=10**6)


def app_of(make=mlp, data=share, **limits):
    app = ClientApp()
    answer_statistics(app, model=lambda context: make(), data=data, **{"first_layer": True, **limits})
    return app


def convolutional(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 10),
        )


def normed(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            *(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5, affine=False), nn.ReLU()),
            *(nn.Flatten(), nn.LayerNorm(80), nn.Linear(80, 10)),
        )
        model[2].weight.data.uniform_(-1, 1)
        model[2].bias.data.normal_()
    return model


def networks(make, alike=False):
    endpoints = [dict(make(0 if alike else seed).state_dict()) for seed in range(NODES)]
    share_of = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    merged = {
        name: sum(part * each[name].double() for part, each in zip(share_of, endpoints, strict=True)).to(value.dtype)
        if value.is_floating_point() and not alike
        else value
        for name, value in endpoints[0].items()
    }
    return endpoints, merged


def refit(make, options=ALL, *, app=None, transit=None, alike=False, nodes=NODES, **keywords):
    endpoints, merged = networks(make, alike)
    grid = SerialGrid(app or app_of(make), NODES, transit=transit)
    program = export_program(make().eval(), EXAMPLE)
    ids = list(range(1, nodes + 1))
    return refit_by_clients(options, grid, ids, program, merged, endpoints[:nodes], WEIGHTS[:nodes], **keywords), merged


def outputs(make, params, data):
    model = make().eval()
    with torch.no_grad():
        return torch.func.functional_call(model, dict(params), (data,))


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


def test_regression_mean_of_identical_networks_is_that_network():
    found, merged = refit(convolutional, RegMean(first_layer=True), alike=True)
    assert all(torch.equal(found.state_dict[name], value) for name, value in merged.items())


def test_regression_mean_takes_one_exchange_and_sends_nobody_the_average():
    queries = []

    class Grid(SerialGrid):
        def push_messages(self, messages):
            messages = list(messages)
            queries.append(messages)
            return super().push_messages(messages)

    endpoints, merged = networks(mlp)
    program = export_program(mlp(), EXAMPLE)
    found = refit_by_clients(
        RegMean(first_layer=True), Grid(app_of(), 3), [1, 2, 3], program, merged, endpoints, WEIGHTS
    )
    assert [len(messages) for messages in queries] == [3]
    assert all(list(each.content.array_records) == ["own"] for each in queries[0])
    assert not torch.equal(found.state_dict["2.weight"], merged["2.weight"])
    torch.testing.assert_close(found.state_dict["2.bias"], merged["2.bias"])


def corrupt(harm, node=2, part="/xx"):
    def transit(replies):
        for each in replies:
            if each.metadata.src_node_id == node and not each.has_error():
                arrays = to_params(each.content["sums"])
                changed = {name: harm(value) if name.endswith(part) else value for name, value in arrays.items()}
                each.content["sums"] = from_params(changed)
        return replies

    return transit


HARM = {
    "garbage": (torch.randn_like, "/xx"),
    "negative count": (lambda value: -value, "/count"),
    "no rows": (lambda value: 0 * value, "/count"),
    "70 dimensions": (lambda value: value.reshape((1,) * 60 + tuple(value.shape)), "/xx"),
    "NaN": (lambda value: value * math.nan, "/xr"),
    "1e37": (lambda value: value * 0 + 1e37, "/x"),
    "2**53 examples": (lambda value: value * 0 + 2**53, "/count"),
    "a larger Gram": (lambda value: value * 1e5, "/xx"),
    "correlation above one": (lambda value: value * 1e5, "/xr"),
    "other type": (lambda value: value.half(), "/r"),
}


@pytest.mark.parametrize("name", HARM)
def test_a_faulty_answer_leaves_the_result_to_the_others(name):
    harm, part = HARM[name]
    options = ClientRefit(first_layer=True)
    found, _ = refit(mlp, options, transit=corrupt(harm, part=part))
    endpoints, merged = networks(mlp)
    program, grid = export_program(mlp(), EXAMPLE), SerialGrid(app_of(), NODES)

    def without(replies):
        return [each for each in replies if each.metadata.src_node_id != 2]

    grid.transit = without
    expected = refit_by_clients(options, grid, [1, 2, 3], program, merged, endpoints, WEIGHTS).state_dict
    for key, value in expected.items():
        torch.testing.assert_close(found.state_dict[key], value)


def test_a_client_that_vanishes_between_exchanges_or_answers_some_operators_only_costs_nothing_else():
    asked = []

    def vanishing(replies):
        asked.append(1)
        return [each for each in replies if each.metadata.src_node_id != 2 or len(asked) == 1]

    found, merged = refit(mlp, transit=vanishing)
    assert len(found.report.operators) == 6
    assert not torch.equal(found.state_dict["4.weight"], merged["4.weight"])

    def partial(replies):
        for each in replies:
            if each.metadata.src_node_id == 2:
                record = each.content["sums"]
                for name in [name for name in record if name.startswith("linear/")]:
                    del record[name]
        return replies

    halved, _ = refit(mlp, ClientRefit(exchanges=1, first_layer=True), transit=partial)
    assert len(halved.report.operators) == 6


def test_without_any_answer_the_aggregate_is_left_to_the_caller():
    with pytest.raises(CalibrationError, match="no client answered the query for sums"):
        refit(mlp, transit=lambda replies: [])
    with pytest.raises(CalibrationError, match="add answer_statistics to its app"):
        refit(mlp, app=ClientApp())


def test_the_order_of_the_answers_does_not_matter():
    one, other = (refit(mlp, transit=order)[0].state_dict for order in (list, lambda replies: replies[::-1]))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_second_moments_of_the_input_without_the_consent_of_both():
    for options, limits in ((ClientRefit(), {}), (ClientRefit(first_layer=True), {"first_layer": False})):
        found, merged = refit(mlp, options, app=app_of(mlp, **limits))
        fitted = {report.operator for report in found.report.operators if report.fit}
        assert fitted == {"linear_1", "linear_2"}
        assert "0.weight" in dict(found.report.skipped)
        assert not torch.equal(found.state_dict["4.weight"], merged["4.weight"])


def test_clients_refuse_few_rows_and_few_held_out_examples():
    endpoints, _ = networks(mlp)
    program = export_program(mlp(), EXAMPLE)
    sneaky = ClientRefit()
    object.__setattr__(sneaky, "positions", 1)
    with pytest.raises(CalibrationError, match="the query draws 1 rows, and the client answers with at least 32"):
        refit_by_clients(sneaky, SerialGrid(app_of(), 1), [1], program, endpoints[0], endpoints[:1], [1.0])
    object.__setattr__(sneaky, "positions", 64)
    object.__setattr__(sneaky, "holdout", 50)
    with pytest.raises(CalibrationError, match="holds one example in 50 out"):
        refit_by_clients(sneaky, SerialGrid(app_of(), 1), [1], program, endpoints[0], endpoints[:1], [1.0])


def test_a_scaled_reply_is_not_asked_and_changes_nothing():
    endpoints, merged = networks(mlp, alike=False)
    four = [*endpoints, {name: -5 * value for name, value in endpoints[0].items()}]
    program, options = export_program(mlp(), EXAMPLE), ClientRefit(first_layer=True)
    ids, weights = [1, 2, 3, 4], [1.0, 1.0, 1.0, 1.0]
    found = refit_by_clients(options, SerialGrid(app_of(), 4), ids, program, merged, four, weights).state_dict
    expected = refit_by_clients(
        options, SerialGrid(app_of(), 4), ids[:3], program, merged, endpoints, weights[:3]
    ).state_dict
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_weights_do_not_count_for_strategies_that_ignore_them():
    endpoints, merged = networks(mlp)
    program, grid = export_program(mlp(), EXAMPLE), SerialGrid(app_of(), NODES)
    found = [
        refit_by_clients(ALL, grid, [1, 2, 3], program, merged, endpoints, weights, equally=True).state_dict
        for weights in (WEIGHTS, [1.0, 1.0, 1.0])
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_price_is_that_of_the_answers():
    sizes = []

    def weigh(replies):
        sizes.extend(
            sum(value.numel() * value.element_size() for value in to_params(each.content["sums"]).values())
            for each in replies
        )
        return replies

    for make in (mlp, convolutional, normed):
        for options in (ALL, ClientRefit(first_layer=True), ClientRefit(exchanges=2), RegMean(first_layer=True)):
            sizes.clear()
            refit(make, options, transit=weigh)
            found = price(options, export_program(make(), EXAMPLE), make().state_dict())
            assert sum(sizes) == NODES * found.answered
            assert len(sizes) == NODES * found.exchanges


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


def test_options_out_of_range_are_refused_at_once():
    for make, match in (
        (lambda: ClientRefit(exchanges=0), "exchanges is 0"),
        (lambda: ClientRefit(strengths=()), r"strengths is \(\)"),
        (lambda: ClientRefit(holdout=11), "holdout is 11, expected at most 10"),
        (lambda: ClientRefit(positions=3), "positions is 3"),
        (lambda: RegMean(shrink=2.0), "shrink is 2.0"),
    ):
        with pytest.raises(ConfigError, match=match):
            make()
    assert asks_clients(ClientRefit())
    assert asks_clients(RegMean())
    assert not asks_clients("repair")
