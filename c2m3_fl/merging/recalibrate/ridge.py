"""Ridge regression towards given weights, from sums over the data, or from the rows themselves if they are smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

_GAIN = 1e-3  # a smaller relative improvement is noise
_EXACT = 1e-9  # a smaller error, relative to the targets' variance, is float32 rounding


@dataclass(frozen=True)
class Sums:
    """Sums over rows x and residuals r, in float64: all that a least-squares fit of r by x needs.

    Every attribute has a leading axis of groups, which are fitted separately. Sums form a monoid under `combine`.

    Attributes
    ----------
    count : float
        Number of rows; whole unless the rows are weighted.
    x : Tensor, shape (groups, inputs)
        Sum of rows.
    r : Tensor, shape (groups, outputs)
        Sum of residuals.
    xx : Tensor, shape (groups, inputs, inputs)
        Sum of x xᵀ.
    xr : Tensor, shape (groups, inputs, outputs)
        Sum of x rᵀ.
    rr : Tensor, shape (groups, outputs)
        Sum of squared residuals, per output.
    """

    count: float
    x: Tensor
    r: Tensor
    xx: Tensor
    xr: Tensor
    rr: Tensor

    @classmethod
    def of(cls, rows: Tensor, residuals: Tensor) -> Sums:
        """Sums of rows (groups, count, inputs) and residuals (groups, count, outputs)."""
        x, r = rows.double(), residuals.double()
        return cls(x.shape[1], x.sum(1), r.sum(1), x.mT @ x, x.mT @ r, r.square().sum(1))

    def combine(self, other: Sums) -> Sums:
        """Sums over both sets of rows."""
        return Sums(
            self.count + other.count,
            self.x + other.x,
            self.r + other.r,
            self.xx + other.xx,
            self.xr + other.xr,
            self.rr + other.rr,
        )

    def scaled(self, factor: float) -> Sums:
        """Sums of the same rows, each counted `factor` times."""
        tensors = (self.x, self.r, self.xx, self.xr, self.rr)
        return Sums(factor * self.count, *(factor * value for value in tensors))

    def against(self, change: Tensor, offset: Tensor) -> Sums:
        """The sums whose residuals are ``r - changeᵀ x - offset``; shapes as of `solve` and `offset`."""
        fitted_x = (self.x[:, None, :] @ change)[:, 0, :]
        xx_change = self.xx @ change
        rr = self.rr - 2 * (change * self.xr).sum(1) + (change * xx_change).sum(1)
        rr = rr - 2 * offset * (self.r - fitted_x) + self.count * offset.square()
        return replace(
            self,
            r=self.r - fitted_x - self.count * offset,
            xr=self.xr - xx_change - self.x[:, :, None] * offset[:, None, :],
            rr=rr,
        )

    def beside(self, others: Sequence[Sums]) -> Sums:
        """The sums of the same rows with the residuals of others beside the own ones."""
        every = (self, *others)
        r, xr, rr = (
            torch.cat(list(each), -1) for each in zip(*((one.r, one.xr, one.rr) for one in every), strict=True)
        )
        return replace(self, r=r, xr=xr, rr=rr)

    def through_origin(self) -> Sums:
        """The sums for a fit without intercept: nothing is centred."""
        return replace(self, x=torch.zeros_like(self.x), r=torch.zeros_like(self.r))

    @property
    def nothing(self) -> Tensor:
        """No change, shape (groups, inputs, outputs)."""
        return torch.zeros_like(self.xr)

    @cached_property
    def gram(self) -> Tensor:
        """Mean of x xᵀ about the mean of x, shape (groups, inputs, inputs)."""
        mean = self.x / self.count
        return self.xx / self.count - mean[:, :, None] * mean[:, None, :]

    @cached_property
    def cross(self) -> Tensor:
        """Mean of x rᵀ about the means, shape (groups, inputs, outputs)."""
        return self.xr / self.count - (self.x / self.count)[:, :, None] * (self.r / self.count)[:, None, :]

    def solve(self, strength: float) -> Tensor:
        """The change that minimises ``mean |r - changeᵀ x - offset|² + strength · scale · |change|²``.

        `scale` is the mean variance of the inputs, so that a strength means the same for every operator.
        """
        gram = self.gram
        return _lifted_solve(gram, strength * gram.diagonal(dim1=-2, dim2=-1).mean(-1), self.cross)

    def offset(self, change: Tensor) -> Tensor:
        """The unpenalised intercept that goes with a change, shape (groups, outputs)."""
        return self.r / self.count - ((self.x / self.count)[:, None, :] @ change)[:, 0, :]

    def error(self, change: Tensor, offset: Tensor) -> Tensor:
        """Mean of (r - changeᵀ x - offset)², shape (groups, outputs)."""
        mean_x, mean_r = self.x / self.count, self.r / self.count
        mean_fit = (mean_x[:, None, :] @ change)[:, 0, :]
        spread = self.rr / self.count - mean_r.square()
        spread = spread + (change * (self.gram @ change)).sum(1) - 2 * (change * self.cross).sum(1)
        return spread.clamp_min(0) + (mean_r - mean_fit - offset).square()


@dataclass(frozen=True)
class Rows:
    """The rows themselves; smaller than their sums if there are fewer rows than inputs.

    Attributes
    ----------
    x : Tensor of float64, shape (groups, count, inputs)
        Rows.
    r : Tensor of float64, shape (groups, count, outputs)
        Residuals.
    centred : bool
        Whether the fit has an intercept.
    """

    x: Tensor
    r: Tensor
    centred: bool = True

    @classmethod
    def of(cls, rows: Tensor, residuals: Tensor) -> Rows:
        """Rows (groups, count, inputs) and residuals (groups, count, outputs)."""
        return cls(rows.double(), residuals.double())

    def combine(self, other: Rows) -> Rows:
        """Both sets of rows."""
        return Rows(torch.cat([self.x, other.x], 1), torch.cat([self.r, other.r], 1), self.centred)

    def beside(self, others: Sequence[Rows]) -> Rows:
        """The same rows with the residuals of others beside the own ones."""
        return replace(self, r=torch.cat([self.r, *(other.r for other in others)], -1))

    def through_origin(self) -> Rows:
        """The rows for a fit without intercept: nothing is centred."""
        return replace(self, centred=False)

    @property
    def nothing(self) -> Tensor:
        """No change, shape (groups, inputs, outputs)."""
        return self.x.new_zeros(len(self.x), self.x.shape[2], self.r.shape[2])

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Means of x and r, (groups, 1, inputs) and (groups, 1, outputs); zeros for a fit without intercept."""
        kept = float(self.centred)
        return kept * self.x.mean(1, keepdim=True), kept * self.r.mean(1, keepdim=True)

    def solve(self, strength: float) -> Tensor:
        """As `Sums.solve`, by the identity (XᵀX + λ)⁻¹ Xᵀ = Xᵀ (XXᵀ + λ)⁻¹."""
        mean_x, mean_r = self.means
        x, r = self.x - mean_x, self.r - mean_r
        scale = x.square().mean((-1, -2))
        found = _lifted_solve(x @ x.mT / x.shape[1], strength * scale, r / x.shape[1])
        return x.mT @ found

    def offset(self, change: Tensor) -> Tensor:
        """As `Sums.offset`."""
        mean_x, mean_r = self.means
        return (mean_r - mean_x @ change)[:, 0, :]

    def error(self, change: Tensor, offset: Tensor) -> Tensor:
        """As `Sums.error`."""
        return (self.r - self.x @ change - offset[:, None, :]).square().mean(1)


Evidence = TypeVar("Evidence", Sums, Rows)


@dataclass(frozen=True)
class Choice:
    """The strength that predicts held-out rows best.

    Attributes
    ----------
    trained : Tensor, shape (groups, inputs, outputs)
        What to add to the weights by the rows to fit alone.
    strength : float
        The chosen ridge strength, relative to the mean variance of the inputs; infinite for "keep the weights".
    error_before, error : float
        Held-out error with the weights kept and with the chosen strength, relative to the targets' variance: mean over
        the targets that vary.
    """

    trained: Tensor
    strength: float
    error_before: float
    error: float

    def change(self, train: Evidence, held_out: Evidence) -> Tensor:
        """What to add to the weights by all rows, with this strength."""
        return self.trained if self.strength == float("inf") else train.combine(held_out).solve(self.strength)


@dataclass(frozen=True)
class Fit:
    """A change of weights.

    Attributes
    ----------
    change : Tensor, shape (groups, inputs, outputs)
        What to add to the weights.
    strength, error_before, error : float
        As of `Choice`.
    """

    change: Tensor
    strength: float
    error_before: float
    error: float


def choose(train: Evidence, held_out: Evidence, strengths: Sequence[float], spread: Tensor) -> Fit:
    """Fit with the strength that predicts held-out rows best, or keep the weights if none is better.

    Parameters
    ----------
    train, held_out : Sums or Rows
        Rows of different inputs.
    strengths : sequence of float
        Candidates, relative to the mean variance of the inputs.
    spread : Tensor, shape (groups, outputs)
        Standard deviation of every target: errors count relative to it.
    """
    (found,) = choose_each([(train, held_out, spread)], strengths)
    return Fit(found.change(train, held_out), found.strength, found.error_before, found.error)


def choose_each(problems: Sequence[tuple[Evidence, Evidence, Tensor]], strengths: Sequence[float]) -> list[Choice]:
    """`choose` for several kinds of residuals of the same rows: one factorisation per strength serves all of them.

    Parameters
    ----------
    problems : sequence of (Sums or Rows, Sums or Rows, Tensor)
        Rows to fit, held-out rows and the targets' spread, as for `choose`; the inputs are those of the first problem.
    strengths : sequence of float
        As for `choose`.
    """
    weights = [_relative_to(spread) for _, _, spread in problems]
    first = problems[0][0]
    together = first.beside([train for train, _, _ in problems[1:]])
    found = []
    for (train, held_out, _), weight in zip(problems, weights, strict=True):
        kept = _mean_error(train, held_out, train.nothing, weight)
        found.append(Choice(train.nothing, float("inf"), kept, kept))
    for strength in strengths:
        changes = torch.split(together.solve(strength), [spread.shape[1] for _, _, spread in problems], dim=2)
        for at, (change, (train, held_out, _)) in enumerate(zip(changes, problems, strict=True)):
            kept, error = found[at].error_before, _mean_error(train, held_out, change, weights[at])
            if kept >= _EXACT and error < kept * (1 - _GAIN) and error < found[at].error:
                found[at] = Choice(change, strength, kept, error)
    return found


def _relative_to(spread: Tensor) -> Tensor:
    """The weight of every target's squared error; targets that do not vary have none."""
    weight = torch.where(spread > 0, 1 / spread.square().clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return weight * (weight.numel() / max(1, int((spread > 0).sum())))


def _mean_error(train: Evidence, held_out: Evidence, change: Tensor, weight: Tensor) -> float:
    return float((held_out.error(change, train.offset(change)) * weight).mean())


def _lifted_solve(matrix: Tensor, ridge: Tensor, right: Tensor) -> Tensor:
    """Solve ``(matrix + ridge) found = right`` for symmetric matrices; zeros if the factorisation fails."""
    ridge = ridge.clamp_min(torch.finfo(torch.float64).tiny)
    lifted = matrix.clone()
    lifted.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None])
    factor, failed = torch.linalg.cholesky_ex(lifted)
    found = torch.cholesky_solve(right, factor)
    return torch.where((failed == 0)[:, None, None] & found.isfinite(), found, 0.0)
