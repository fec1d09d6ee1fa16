from __future__ import annotations

import pytest
import torch
from torch import Tensor

from c2m3_fl.merging.recalibrate.ridge import Rows, Sums, choose, choose_each


def _data(count: int, seed: int, noise: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    rows = 1 + torch.randn(2, count, 4, generator=generator, dtype=torch.float64)
    residuals = rows @ truth + 5 + noise * torch.randn(2, count, 3, generator=generator, dtype=torch.float64)
    return rows, residuals, truth


def test_sums_of_parts_combine_to_those_of_the_whole() -> None:
    rows, residuals, _ = _data(30, 0)
    whole, parts = Sums.of(rows, residuals), Sums.of(rows[:, :7], residuals[:, :7])
    parts = parts.combine(Sums.of(rows[:, 7:], residuals[:, 7:]))
    torch.testing.assert_close(parts.gram, whole.gram)
    torch.testing.assert_close(parts.cross, whole.cross)


def test_without_ridge_the_solution_is_least_squares_with_an_intercept() -> None:
    rows, residuals, _ = _data(50, 0)
    design = torch.cat([rows, torch.ones(2, 50, 1, dtype=torch.float64)], -1)
    wanted = torch.linalg.lstsq(design, residuals).solution
    sums = Sums.of(rows, residuals)
    change = sums.solve(0.0)
    torch.testing.assert_close(change, wanted[:, :-1])
    torch.testing.assert_close(sums.offset(change), wanted[:, -1])


def test_the_ridge_solution_is_stationary() -> None:
    sums = Sums.of(*_data(50, 0)[:2])
    strength = 0.3
    scale = sums.gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    change = sums.solve(strength)
    torch.testing.assert_close(sums.gram @ change + strength * scale * change, sums.cross)


def test_the_error_of_a_change_is_that_of_its_predictions() -> None:
    rows, residuals, truth = _data(40, 1)
    offset = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    wanted = (residuals - rows @ truth - offset[:, None]).square().mean(1)
    torch.testing.assert_close(Sums.of(rows, residuals).error(truth, offset), wanted)


def test_through_the_origin_there_is_no_intercept() -> None:
    rows, residuals, _ = _data(50, 0)
    sums = Sums.of(rows, residuals).through_origin()
    change = sums.solve(0.0)
    torch.testing.assert_close(change, torch.linalg.lstsq(rows, residuals).solution)
    assert sums.offset(change).eq(0).all()


def test_held_out_rows_choose_a_weak_ridge_for_a_signal_and_keep_the_weights_for_noise() -> None:
    spread = torch.ones(2, 3, dtype=torch.float64)
    train, held_out = (Sums.of(*_data(40, seed)[:2]) for seed in (0, 1))
    fit = choose(train, held_out, (1e-6, 1e-3, 1.0, 1e3), spread)
    assert fit.strength <= 1e-3
    assert fit.error < 0.1 < fit.error_before
    generator = torch.Generator().manual_seed(2)
    noise = [torch.randn(2, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    blind = [Sums.of(rows, torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)) for rows in noise]
    kept = choose(blind[0], blind[1], (1e-6, 1e-3), spread)
    assert kept.strength == float("inf")
    assert kept.change.eq(0).all()


def test_a_singular_problem_has_a_finite_solution() -> None:
    rows = torch.ones(1, 8, 4, dtype=torch.float64)
    assert Sums.of(rows, rows[..., :2]).solve(1e-6).isfinite().all()


@pytest.mark.parametrize("intercept", [True, False])
def test_rows_and_their_sums_give_the_same_fit(intercept: bool) -> None:
    (train, held_out), spread = (_data(count, count)[:2] for count in (3, 9)), torch.ones(2, 3, dtype=torch.float64)
    fits = []
    for kind in (Sums, Rows):
        evidence = [kind.of(*part) for part in (train, held_out)]
        one, two = evidence if intercept else [each.through_origin() for each in evidence]
        fits.append(choose(one, two, (1e-2, 1.0), spread))  # three rows of four inputs: fewer than inputs
        torch.testing.assert_close(one.offset(fits[-1].change), one.offset(fits[0].change))
    assert fits[0].strength == fits[1].strength
    torch.testing.assert_close(fits[1].change, fits[0].change)
    assert fits[1].error == pytest.approx(fits[0].error)


def test_errors_are_means_over_the_targets_that_count() -> None:
    rows, residuals, _ = _data(40, 0)
    counting = torch.tensor([True, False, True])
    spread = torch.where(counting, torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64), 0.0).expand(2, 3)
    sides = [(rows[:, :30], residuals[:, :30]), (rows[:, 30:], residuals[:, 30:])]
    found = choose(*(Sums.of(*side) for side in sides), (1e-6, 1e-3), spread)
    alone = choose(*(Sums.of(x, r[..., counting]) for x, r in sides), (1e-6, 1e-3), spread[:, counting])
    assert (found.strength, found.error_before, found.error) == pytest.approx(
        (alone.strength, alone.error_before, alone.error)
    )


@pytest.mark.parametrize("kind", [Sums, Rows])
def test_several_residuals_of_the_same_rows_are_chosen_as_each_alone_with_one_factorisation_per_strength(
    kind: type[Sums] | type[Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, residuals, _ = _data(40, 0, noise=2.0)
    spread = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).expand(2, 3)
    noise = torch.randn(residuals.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    targets = [residuals, noise, residuals.square()]
    problems = [tuple(kind.of(rows[:, part], r[:, part]) for part in (slice(0, 30), slice(30, 40))) for r in targets]
    strengths = (1e-6, 0.1, 10.0)
    factorise, counted = torch.linalg.cholesky_ex, []
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: counted.append(1) or factorise(matrix))
    found = choose_each([(train, held, spread) for train, held in problems], strengths)
    assert len(counted) == len(strengths)
    for choice, (train, held) in zip(found, problems, strict=True):
        alone = choose(train, held, strengths, spread)
        assert (choice.strength, choice.error_before) == (alone.strength, alone.error_before)
        assert choice.error == pytest.approx(alone.error, rel=1e-9)
        torch.testing.assert_close(choice.change(train, held), alone.change)
        by_training = 0 * alone.change if choice.strength == float("inf") else train.solve(choice.strength)
        torch.testing.assert_close(choice.trained, by_training)
    assert found[1].strength == float("inf") > found[0].strength
