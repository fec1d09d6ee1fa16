"""Random sketches of rows: on average their second moments, and nothing that the server can draw again."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from c2m3_fl.errors import ParamsError
from c2m3_fl.merging.recalibrate.from_clients.packing import pack, unpack
from c2m3_fl.merging.recalibrate.from_clients.plan import Role
from c2m3_fl.merging.recalibrate.from_clients.pool import outlying, pool_fits
from c2m3_fl.merging.recalibrate.from_clients.sketch import Noise, Sketch, SketchAnswer
from c2m3_fl.merging.recalibrate.from_clients.sums import Drawing, FitAnswer, measure
from c2m3_fl.merging.recalibrate.ridge import Sums
from c2m3_fl.network.calibration import load_batches
from c2m3_fl.network.program import export_batches
from tests.merging.networks import images, nodes


def rows(seed=0, count=50):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, count, size, generator=generator, dtype=torch.float64) + 3 for size in (6, 3))


def test_the_sums_of_sketches_are_on_average_those_of_the_rows():
    x, r = rows()
    expected = Sums.of(x, r)
    found = [Sketch.of(x, [r], Noise(seed), 20).centred().sums(0) for seed in range(400)]
    for name in ("x", "r", "xx", "xr", "rr"):
        drawn = torch.stack([getattr(each, name) for each in found])
        error = (drawn.mean(0) - getattr(expected, name)).abs()
        assert bool((error <= 5 * drawn.std(0) / 20 + 1e-9).all()), name  # 20: the root of the number of draws
    torch.testing.assert_close(found[0].x, expected.x)
    torch.testing.assert_close(found[0].r, expected.r)


def test_the_sketch_of_parts_is_that_of_the_whole():
    x, r = rows()
    noise, again = Noise(0), Noise(0)
    whole = Sketch.of(x[:, :30], [r[:, :30]], noise, 4).combine(Sketch.of(x[:, 30:], [r[:, 30:]], noise, 4))
    drawn = torch.cat([again.draw(2, 4, 30), again.draw(2, 4, 20)], 2)
    torch.testing.assert_close(whole.xs, drawn @ x)
    torch.testing.assert_close(whole.rs[0], drawn @ r)
    torch.testing.assert_close(whole.centred().xs, drawn @ (x - x.mean(1, keepdim=True)))


def answer(seed, scale=1.0):
    x, r = rows(seed)
    sides = [
        Sketch.of(scale * x[:, part], [scale * r[:, part]], Noise(seed), 8) for part in (slice(0, 40), slice(40, 50))
    ]
    return unpack(pack(SketchAnswer(*sides), torch.float64), Role.FIT)


def test_sketches_and_sums_pool_and_compare_with_each_other():
    x, r = rows(3)
    exact = FitAnswer(Sums.of(x[:, :40], r[:, :40]), Sums.of(x[:, 40:], r[:, 40:]))
    layer = (torch.ones(2, 6, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64))
    answers = {1: answer(1), 2: answer(2), 3: exact, 4: answer(4, 100.0)}
    for reference in (None, layer):
        assert list(outlying(answers, reference)) == [4]
    pooled = pool_fits([answers[1], exact], [0.25, 0.75])
    assert pooled.train.count + pooled.held_out.count == pytest.approx(1)
    parts = [answers[1].train.sums(0).scaled(0.25 / 50), exact.train.scaled(0.75 / 50)]
    torch.testing.assert_close(pooled.train.xx, parts[0].xx + parts[1].xx)


@pytest.mark.parametrize("harm", [float("nan"), float("inf"), 1e37])
def test_sketches_that_are_no_numbers_are_refused(harm):
    x, r = rows()
    tensors = pack(SketchAnswer(*(Sketch.of(x, [r], Noise(0), 8) for _ in range(2))), torch.float32)
    with pytest.raises(ParamsError, match="NaN or values beyond"):
        unpack({**tensors, "train/own/rs": tensors["train/own/rs"] * 0 + harm}, Role.FIT)


def test_a_sketch_depends_on_the_data_and_the_network_and_on_nothing_that_changes_from_call_to_call():
    model, (merged, own) = nodes("mlp", 2)
    place = 1

    def sketch(data, params):
        batches = load_batches([data])
        programs = export_batches(model, batches)
        roles, drawing = {place: Role.FIT}, Drawing(positions=64, holdout=5, seed=0)
        (found,) = measure(programs, batches, params, own, roles, drawing, {place: 8}).values()
        return found.train

    data = images(40, 0)
    first, again = sketch(data, merged), sketch(data, merged)
    assert all(torch.equal(one, other) for one, other in zip(astuple(first)[3], astuple(again)[3], strict=True))
    changed = data.clone()
    changed[0, 0, 0, 0] += 1
    nudged = {name: value * (1 + 1e-6) for name, value in merged.items()}
    for other in (sketch(changed, merged), sketch(data, nudged)):
        assert not torch.allclose(other.ones, first.ones)  # other noise, not another input alone
