"""Random sketches of rows: fewer numbers than second moments where an operator has many inputs.

A Gaussian matrix S of s rows, scaled so that E[SᵀS] = I, turns n centred rows X with residuals R into s rows S X and
S R, whose second moments are on average those of X and R. Per row of S they are draws from a normal distribution
whose covariance is XᵀX, XᵀR, RᵀR: whoever does not know S learns from them no more than these second moments, and less
the smaller s is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.merging.recalibrate.ridge import Sums


class Noise:
    """Draws Gaussian matrices for one sketch.

    Parameters
    ----------
    seed : int
        Decides all draws; nobody but the owner of the rows may know it.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, groups: int, size: int, count: int) -> Tensor:
        """Matrices of float64, shape (groups, size, count), whose entries have variance 1 / size."""
        drawn: Tensor = torch.randn((groups, size, count), generator=self._generator, dtype=torch.float64) / size**0.5
        return drawn


def held_out_size(size: int) -> int:
    """Number of rows of the sketch of the examples held out, which are fewer, beside one of `size` rows."""
    return -(-size // 4)


@dataclass(frozen=True)
class Sketch:
    """Sketched rows and residuals; a monoid under `combine`.

    Attributes
    ----------
    count : int
        Number of rows that are sketched.
    x : Tensor, shape (groups, inputs)
        Sum of rows.
    r : tuple of Tensor, shape (groups, outputs)
        Sum of the residuals to every target.
    ones : Tensor, shape (groups, sketch)
        The sketch of a column of ones.
    xs : Tensor, shape (groups, sketch, inputs)
        The sketch of the rows.
    rs : tuple of Tensor, shape (groups, sketch, outputs)
        The sketch of the residuals to every target.
    """

    count: int
    x: Tensor
    r: tuple[Tensor, ...]
    ones: Tensor
    xs: Tensor
    rs: tuple[Tensor, ...]

    @classmethod
    def of(cls, rows: Tensor, residuals: Sequence[Tensor], noise: Noise, size: int) -> Sketch:
        """Sketch in `size` rows of rows (groups, count, inputs) and residuals (groups, count, outputs) per target."""
        drawn = noise.draw(len(rows), size, rows.shape[1]).to(rows.device)
        return cls(
            rows.shape[1],
            rows.sum(1),
            tuple(each.sum(1) for each in residuals),
            drawn.sum(2),
            drawn @ rows,
            tuple(drawn @ each for each in residuals),
        )

    def combine(self, other: Sketch) -> Sketch:
        """Sketch of both sets of rows."""
        return Sketch(
            self.count + other.count,
            self.x + other.x,
            tuple(one + another for one, another in zip(self.r, other.r, strict=True)),
            self.ones + other.ones,
            self.xs + other.xs,
            tuple(one + another for one, another in zip(self.rs, other.rs, strict=True)),
        )

    def centred(self) -> Centred:
        """The sketch about the means, as it is sent."""
        count = max(1, self.count)
        x, r = self.x / count, tuple(each / count for each in self.r)

        def about(mean: Tensor, sketch: Tensor) -> Tensor:
            return sketch - self.ones[:, :, None] * mean[:, None, :]

        return Centred(self.count, x, r, about(x, self.xs), tuple(map(about, r, self.rs)))


@dataclass(frozen=True)
class Centred:
    """A sketch of centred rows, and the means.

    Attributes
    ----------
    count : int
        Number of rows that are sketched.
    x, r : Tensor and tuple of Tensor
        Means of the rows and of the residuals to every target.
    xs, rs : Tensor and tuple of Tensor
        As of `Sketch`, of the centred rows and residuals.
    """

    count: int
    x: Tensor
    r: tuple[Tensor, ...]
    xs: Tensor
    rs: tuple[Tensor, ...]

    def sums(self, target: int) -> Sums:
        """Sums of the residuals to one target that are, on average, those of the rows."""
        count, x, r, rows, residuals = self.count, self.x, self.r[target], self.xs, self.rs[target]
        return Sums(
            count,
            count * x,
            count * r,
            rows.mT @ rows + count * x[:, :, None] * x[:, None, :],
            rows.mT @ residuals + count * x[:, :, None] * r[:, None, :],
            residuals.square().sum(1) + count * r.square(),
        )


@dataclass(frozen=True)
class SketchAnswer:
    """What a client answers about an operator in place of its sums.

    Attributes
    ----------
    train, held_out : Sketch
        Of the examples to fit and the examples held out; the second target, if there is one, is the own sum without
        the merged skip.
    """

    train: Sketch
    held_out: Sketch

    def combine(self, other: SketchAnswer) -> SketchAnswer:
        """Sketches of both sets of rows."""
        return SketchAnswer(self.train.combine(other.train), self.held_out.combine(other.held_out))


@dataclass(frozen=True)
class SketchedFit:
    """What the server reads of it; sums of many inputs take much memory, so they are made one client at a time.

    Attributes
    ----------
    train, held_out : Centred
        As of `SketchAnswer`.
    """

    train: Centred
    held_out: Centred
