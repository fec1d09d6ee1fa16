from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.merging.recalibrate.softmax_fit import Classified, Layer, balance, choose_scores, path

STRENGTHS = (1e-4, 1e-2, 1.0)


def _rows(count: int, seed: int) -> Classified:
    generator = torch.Generator().manual_seed(seed)
    x = 1 + torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return Classified(x, (_truth()(x) + 0.1 * torch.randn(count, 3, generator=generator)).softmax(1))


def _truth() -> Layer:
    generator = torch.Generator().manual_seed(99)
    return Layer(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (3,))))


def _start() -> Layer:
    return Layer(torch.zeros(4, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))


def _objective(rows: Classified, layer: Layer, start: Layer, strength: float) -> Tensor:
    scale = rows.x.var(0, correction=0).mean()
    cross = nn.functional.cross_entropy(layer(rows.x), rows.goal)
    return cross + strength * scale / 2 * (layer.weight - start.weight).square().sum()


def test_the_fit_is_stationary() -> None:
    rows = _rows(60, 0)
    for strength, layer in path(rows, _start(), STRENGTHS, bias=True).items():
        parts = [part.clone().requires_grad_() for part in (layer.weight, layer.bias)]
        gradients = torch.autograd.grad(_objective(rows, Layer(*parts), _start(), strength), parts)
        assert max(float(each.abs().max()) for each in gradients) < 1e-3


def test_a_fit_is_never_worse_than_its_start() -> None:
    rows, start = _rows(60, 0), Layer(5 * _truth().weight.flip(0), _truth().bias)
    for strength, layer in path(rows, start, STRENGTHS, bias=True).items():
        assert _objective(rows, layer, start, strength) <= _objective(rows, start, start, strength)


def test_the_truth_is_kept() -> None:
    rows = Classified(_rows(60, 0).x, _truth()(_rows(60, 0).x).softmax(1))
    fit = choose_scores(rows, rows, _truth(), STRENGTHS, bias=True)
    assert fit.strength == float("inf")
    assert torch.equal(fit.layer.weight, _truth().weight)


def test_held_out_rows_choose_a_weak_ridge_for_a_signal() -> None:
    fit = choose_scores(_rows(60, 0), _rows(60, 1), _start(), STRENGTHS, bias=True)
    assert fit.strength < 1
    assert fit.error < 0.1 * fit.error_before


def test_a_bias_that_is_not_there_stays_zero() -> None:
    fit = choose_scores(_rows(60, 0), _rows(60, 1), _start(), STRENGTHS, bias=False)
    assert fit.layer.bias.eq(0).all()


def test_endpoints_that_agree_are_left_their_prior() -> None:
    means = torch.tensor([[0.7, 0.2, 0.1]] * 3, dtype=torch.float64)
    assert balance(means, torch.full((3,), 1 / 3), 0.1).tolist() == pytest.approx([1.0] * 3)


def test_endpoints_that_know_other_classes_are_balanced() -> None:
    means = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.4]], dtype=torch.float64)
    assert balance(means, torch.tensor([0.5, 0.5]), 0.1).tolist() == pytest.approx([0.5, 0.3, 0.2])
