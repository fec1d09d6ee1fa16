"""Barriers: how much worse than given networks their weighted means are, along a segment or over a simplex."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Unpack

import torch
from torch import nn

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.evaluate.scoring import Score, Scorer, ScorerOptions
from c2m3_fl.network.calibration import Calibration


@dataclass(frozen=True)
class Line:
    """Scores along the straight line between two networks.

    Attributes
    ----------
    positions : tuple of float
        From 0, the first network, to 1, the second.
    scores : tuple of Score
        At these positions.
    """

    positions: tuple[float, ...]
    scores: tuple[Score, ...]

    @property
    def loss_barrier(self) -> float:
        """Largest excess of the loss over the line between the ends' losses; never negative."""
        ends = self.scores[0].loss, self.scores[-1].loss
        return max(
            score.loss - (1 - t) * ends[0] - t * ends[1] for t, score in zip(self.positions, self.scores, strict=True)
        )

    @property
    def accuracy_barrier(self) -> float:
        """Largest shortfall of the accuracy below the line between the ends' accuracies; never negative."""
        ends = self.scores[0].accuracy, self.scores[-1].accuracy
        return max(
            (1 - t) * ends[0] + t * ends[1] - score.accuracy
            for t, score in zip(self.positions, self.scores, strict=True)
        )


@dataclass(frozen=True)
class Simplex:
    """Scores of weighted means of many networks.

    Attributes
    ----------
    weights : tuple of tuple of float
        One weight per network for every point: the corners first, then the centre, then the others.
    scores : tuple of Score
        At these points.
    """

    weights: tuple[tuple[float, ...], ...]
    scores: tuple[Score, ...]

    @property
    def loss_barrier(self) -> float:
        """Largest excess of a mean's loss over the mean of the losses."""
        corners = self.scores[: len(self.weights[0])]
        return max(score.loss - _dot(w, [each.loss for each in corners]) for w, score in self._points())

    @property
    def accuracy_barrier(self) -> float:
        """Largest shortfall of a mean's accuracy below the mean of the accuracies."""
        corners = self.scores[: len(self.weights[0])]
        return max(_dot(w, [each.accuracy for each in corners]) - score.accuracy for w, score in self._points())

    def _points(self) -> list[tuple[tuple[float, ...], Score]]:
        return list(zip(self.weights, self.scores, strict=True))


def barrier(
    model: nn.Module,
    first: Params,
    second: Params,
    data: Calibration,
    *,
    points: int = 11,
    **options: Unpack[ScorerOptions],
) -> Line:
    """Score the segment between two networks.

    Parameters
    ----------
    model : nn.Module
        The architecture; not mutated.
    first, second : mapping of str to Tensor
        The ends; align them to one basis first, unless the barrier without alignment is wanted.
    data : iterable of labelled batches
        What to score on.
    points : int
        Number of equidistant points, ends included.
    **options
        `example_inputs` and `inputs` as for `merge`; `renormalise`, whether running statistics of BatchNorm are
        re-estimated between the networks (by default if there are any).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Linear(4, 3)
    >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    >>> barrier(model, model.state_dict(), model.state_dict(), data).loss_barrier < 1e-6
    True
    """
    if points < 2:
        raise ConfigError(f"points is {points}, expected at least the two ends")
    scorer = Scorer(model, [first, second], data, **options)
    positions = tuple(index / (points - 1) for index in range(points))
    return Line(positions, tuple(scorer.score([1 - t, t]) for t in positions))


def pairwise_barriers(
    model: nn.Module,
    nodes: Sequence[Params],
    data: Calibration,
    *,
    points: int = 11,
    **options: Unpack[ScorerOptions],
) -> dict[tuple[int, int], Line]:
    """The segment between every pair of networks: see `barrier`.

    Parameters
    ----------
    model : nn.Module
        The architecture; not mutated.
    nodes : sequence of mappings of str to Tensor
        The networks.
    data : iterable of labelled batches
        What to score on.
    points : int
        Number of equidistant points, ends included.
    **options
        `example_inputs` and `inputs` as for `merge`; `renormalise`, whether running statistics of BatchNorm are
        re-estimated between the networks (by default if there are any).

    Examples
    --------
    >>> nodes = [nn.Linear(4, 3).state_dict() for _ in range(3)]
    >>> list(pairwise_barriers(nn.Linear(4, 3), nodes, [(torch.randn(8, 4), torch.randint(3, (8,)))], points=3))
    [(0, 1), (0, 2), (1, 2)]
    """
    between = partial(barrier, points=points, **options)
    return {(i, j): between(model, nodes[i], nodes[j], data) for i, j in itertools.combinations(range(len(nodes)), 2)}


def simplex(
    model: nn.Module,
    nodes: Sequence[Params],
    data: Calibration,
    *,
    samples: int = 0,
    seed: int = 0,
    **options: Unpack[ScorerOptions],
) -> Simplex:
    """Score the corners and the centre of the simplex that many networks span, and points drawn uniformly from it.

    Parameters
    ----------
    model : nn.Module
        The architecture; not mutated.
    nodes : sequence of mappings of str to Tensor
        The networks; align them to one basis first, unless the barrier without alignment is wanted.
    data : iterable of labelled batches
        What to score on.
    samples : int
        Number of points that are drawn.
    seed : int
        Seed of the draw.
    **options
        `example_inputs` and `inputs` as for `merge`; `renormalise`, whether running statistics of BatchNorm are
        re-estimated between the networks (by default if there are any).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> nodes = [nn.Linear(4, 3).state_dict() for _ in range(3)]
    >>> found = simplex(nn.Linear(4, 3), nodes, [(torch.randn(8, 4), torch.randint(3, (8,)))], samples=10)
    >>> len(found.weights), found.loss_barrier < 1e-6  # the loss of a linear model is convex
    (14, True)
    """
    if len(nodes) < 2:
        raise ConfigError(f"a simplex needs at least two networks, got {len(nodes)}")
    if samples < 0:
        raise ConfigError(f"samples is {samples}, expected none or more")
    scorer = Scorer(model, nodes, data, **options)
    count = len(nodes)
    corners = [[float(row == column) for column in range(count)] for row in range(count)]
    drawn = -torch.rand(samples, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log()
    weights = [*corners, [1 / count] * count, *(drawn / drawn.sum(1, keepdim=True)).tolist()]
    return Simplex(tuple(tuple(each) for each in weights), tuple(scorer.score(each) for each in weights))


def _dot(weights: Sequence[float], values: Sequence[float]) -> float:
    return sum(weight * value for weight, value in zip(weights, values, strict=True))
