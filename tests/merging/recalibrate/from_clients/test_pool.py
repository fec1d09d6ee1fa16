"""Pooled sums: semidefinite, weighted by the strategy, and without the answers that are too large."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from c2m3_fl.errors import ParamsError
from c2m3_fl.merging.recalibrate.from_clients.folded_norm import effective
from c2m3_fl.merging.recalibrate.from_clients.packing import pack, unpack
from c2m3_fl.merging.recalibrate.from_clients.plan import Role
from c2m3_fl.merging.recalibrate.from_clients.pool import (
    far_networks,
    far_statistics,
    outlying,
    pool_fits,
    pool_moments,
    shares_of,
)
from c2m3_fl.merging.recalibrate.from_clients.sums import Drawing, FitAnswer, measure
from c2m3_fl.merging.recalibrate.ridge import Sums
from c2m3_fl.network.calibration import load_batches
from c2m3_fl.network.moments import Moments
from c2m3_fl.network.program import export_batches
from tests.merging.networks import images, nodes


def answer(seed, count, scale=1.0, inputs=6, outputs=3):
    generator = torch.Generator().manual_seed(seed)

    def drawn(size):
        rows = torch.randn(2, count, size, generator=generator) + 5
        return rows * scale

    def sums():
        return Sums.of(drawn(inputs), drawn(outputs))

    return FitAnswer(sums(), sums(), None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pooled_second_moments_are_positive_semidefinite_also_of_few_rows(dtype):
    answers = [unpack(pack(answer(seed, 3, scale), dtype), Role.FIT) for seed, scale in ((0, 1.0), (1, 20.0), (2, 0.1))]
    for part in ("train", "held_out"):
        gram = getattr(pool_fits(answers, [0.2, 0.5, 0.3]), part).xx
        lowest = torch.linalg.eigvalsh(gram).min(-1).values
        assert bool((lowest >= -1e-6 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)).all())


def test_what_is_packed_is_what_is_unpacked():
    given = answer(0, 50)
    found = unpack(pack(given, torch.float64), Role.FIT)
    for part in ("train", "held_out"):
        for name, value in vars(getattr(given, part)).items():
            torch.testing.assert_close(getattr(getattr(found, part), name), value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [0, 4])
def test_inputs_that_do_not_vary_are_no_fault(dtype, kept):
    """Dead units are constants, whatever their activation gives at rest; rounding must make no negative variance."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 300, 20, generator=generator)
    rows[..., kept:] = 3 * torch.rand(20 - kept, generator=generator)
    sums = Sums.of(rows, torch.randn(1, 300, 2, generator=generator))
    assert bool((sums.gram.diagonal(dim1=-2, dim2=-1) < 0).any())
    train = unpack(pack(FitAnswer(sums, sums), dtype), Role.FIT).train
    variance = train.gram.diagonal(dim1=-2, dim2=-1)[0]
    assert float(variance[kept:].abs().max()) <= 1e-12
    assert bool((variance[:kept] > 0.5).all())
    assert float(train.solve(1e-6)[0, kept:].abs().max()) <= 1e-3


def test_a_client_counts_by_its_weight_and_not_by_its_rows():
    few, many = answer(0, 10), answer(1, 1000)
    pooled = pool_fits([few, many], [0.7, 0.3])
    assert pooled.train.count + pooled.held_out.count == pytest.approx(1)
    expected = sum(
        share * (each.train.x + each.held_out.x) / (each.train.count + each.held_out.count)
        for share, each in ((0.7, few), (0.3, many))
    )
    torch.testing.assert_close(pooled.train.x + pooled.held_out.x, expected)


def test_pooled_moments_are_those_of_all_values_where_weights_are_counts():
    parts = [torch.randn(count, 4) * count + count for count in (5, 20, 3)]
    found = pool_moments([Moments.of(part, (1,)) for part in parts], [len(part) / 28 for part in parts])
    expected = Moments.of(torch.cat(parts), (1,))
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.unbiased_variance, expected.unbiased_variance)


def test_no_weight_counts_more_than_ten_times_the_median():
    assert shares_of([1.0, 1.0, 1e9], equally=False)[2] == pytest.approx(10 / 12)
    assert shares_of([1.0, 2.0, 1.0], equally=False) == pytest.approx([0.25, 0.5, 0.25])
    assert shares_of([1.0, 1.0, 1e9], equally=True) == pytest.approx([1 / 3] * 3)
    assert shares_of([0.0, 0.0], equally=False) == [0.5, 0.5]
    assert shares_of([0.0, 2.0], equally=False) == [0.0, 1.0]


def test_answers_that_are_too_large_are_named_and_the_others_are_not():
    found = outlying({7: answer(0, 40), 8: answer(1, 40, 1.5), 9: answer(2, 40, 100.0)})
    assert list(found) == [9]
    assert "times the median" in found[9]


@pytest.mark.parametrize("scale", [1e15, 1e-3, 1e-37])
def test_where_half_differ_from_the_other_half_nobody_knows_which_is_wrong(scale):
    assert sorted(outlying({1: answer(0, 40), 2: answer(1, 40, scale)})) == [1, 2]
    halves = {client: answer(client, 40, scale if client > 2 else 1.0) for client in (1, 2, 3, 4)}
    assert sorted(outlying(halves)) == [1, 2, 3, 4]
    assert list(outlying({**halves, 3: answer(3, 40)})) == [4]


def statistics(count, change):
    """The state dicts of a network with BatchNorm that were trained on different data, the last one's changed."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        model.load_state_dict({**model.state_dict(), "1.running_mean": torch.zeros(8), "1.running_var": torch.ones(8)})
        for _ in range(40):
            model.train()(torch.randn(30, 6, generator=generator) * (1 + seed / 2) + seed / 4)
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    change(found[-1])
    return load_batches([torch.zeros(2, 6)]), model, found


@pytest.mark.parametrize(
    ("change", "far"),
    [
        (lambda params: None, []),
        (lambda params: params["1.running_mean"].add_(100), [3]),
        (lambda params: params["1.running_mean"].sub_(100), [3]),
        (lambda params: params["1.running_var"].mul_(1e-12), [3]),
        (lambda params: params["1.running_var"].mul_(1e12), [3]),
        (lambda params: params["1.running_var"][:1].zero_(), []),  # a dead channel
    ],
)
def test_running_statistics_are_far_where_all_channels_are_spreads_away_from_the_others(change, far):
    batches, model, params = statistics(4, change)
    (program,) = export_batches(model.eval(), batches)
    assert far_statistics(program, params) == far
    assert far_statistics(program, params[2:]) == [], "of two, none is known to be right"


def test_a_scaled_network_is_far_and_networks_that_were_trained_apart_are_not():
    model, endpoints = nodes("mlp", 4)
    (program,) = export_batches(model, load_batches([images(8, 0)]))
    assert far_networks(program, endpoints) == []
    alike = [{name: value + 0.3 * each[name] for name, value in endpoints[0].items()} for each in endpoints]
    for factor, honest in ((-5.0, alike), (10.0, endpoints), (1e30, endpoints)):
        scaled = {name: factor * value for name, value in honest[1].items()}
        assert far_networks(program, [honest[0], scaled, *honest[2:]]) == [1]


def broken(name, value):
    tensors = pack(answer(0, 50), torch.float64)
    tensors[name] = value(tensors[name])
    return tensors


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("train/count", lambda value: value * 0, "is of 0 rows"),
        ("held-out/count", lambda value: -value, "is of -50 rows"),
        ("train/count", lambda value: value * 0 + 2**53, "rows, expected a whole number"),
        ("train/x", lambda value: value / 0, "NaN or values beyond"),
        ("train/xx", lambda value: value - 100, "not positive semidefinite"),
        ("train/own/xr", lambda value: value + 1e3, "correlate by more than one"),
        ("train/own/rr", lambda value: -value, "correlate by more than one"),
    ],
)
def test_sums_that_no_data_have_are_refused(name, value, match):
    with pytest.raises(ParamsError, match=match):
        unpack(broken(name, value), Role.FIT)


def test_the_sums_of_a_client_do_not_depend_on_its_batches():
    model, (merged, own) = nodes("cnn", 2)
    data, drawing = images(64, 0), Drawing(positions=10**6, holdout=5, seed=0)
    found = []
    for batches in (data.split(64), data.split(16), data.flip(0).split(32)):
        loaded = load_batches(list(batches))
        programs = export_batches(model, loaded)
        places = [place for place, each in enumerate(programs[0].operators) if each.kind.value == "convolution"]
        found.append(measure(programs, loaded, merged, own, dict.fromkeys(places, Role.FIT), drawing))
    for other in found[1:]:
        for name, answered in found[0].items():
            for part in ("train", "held_out"):
                one, two = getattr(answered, part), getattr(other[name], part)
                assert one.count == two.count
                torch.testing.assert_close(one.xr, two.xr, rtol=1e-4, atol=1e-2)


def test_targets_follow_from_the_sums_of_residuals():
    model, (merged, own) = nodes("mlp", 2)
    loaded = load_batches([images(40, 0)])
    programs = export_batches(model, loaded)
    operator = programs[0].operators[0]
    answered = measure(programs, loaded, merged, own, {0: Role.FIT}, Drawing(100, 5, 0))[operator.name]
    matrix, offset = effective(operator, None, merged)
    targets = answered.train.combine(answered.held_out).against(-matrix, -offset)
    expected = (images(40, 0).flatten(1) @ own[operator.weight].T + own[operator.bias]).double()
    torch.testing.assert_close(targets.r[0], expected.sum(0), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(targets.rr[0], expected.square().sum(0), rtol=1e-4, atol=1e-3)
