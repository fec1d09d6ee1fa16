"""Landscapes: scores across the plane through three networks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.evaluate.scoring import Scorer, ScorerOptions
from c2m3_fl.network.calibration import Calibration


@dataclass(frozen=True, eq=False)
class Landscape:
    """Scores across the plane through three networks.

    Attributes
    ----------
    x, y : tuple of float
        Coordinates of the grid's columns and rows, in the units of parameter space.
    corners : tuple of (float, float)
        Coordinates of the three networks.
    loss, accuracy : Tensor of float64, shape (rows, columns)
        The scores.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    corners: tuple[tuple[float, float], ...]
    loss: Tensor
    accuracy: Tensor


def landscape(
    model: nn.Module,
    nodes: Sequence[Params],
    data: Calibration,
    *,
    resolution: int = 21,
    margin: float = 0.25,
    **options: Unpack[ScorerOptions],
) -> Landscape:
    """Score a grid in the plane through three networks.

    Parameters
    ----------
    model : nn.Module
        The architecture; not mutated.
    nodes : sequence of three mappings of str to Tensor
        The first is the origin, the second lies on the horizontal axis.
    data : iterable of labelled batches
        What to score on.
    resolution : int
        Points along each side.
    margin : float
        How far the grid reaches beyond the networks, relative to their extent.
    **options
        `example_inputs` and `inputs` as for `merge`; `renormalise`, whether running statistics of BatchNorm are
        re-estimated between the networks (by default if there are any).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> nodes = [nn.Linear(4, 3).state_dict() for _ in range(3)]
    >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    >>> landscape(nn.Linear(4, 3), nodes, data, resolution=5).loss.shape
    torch.Size([5, 5])
    """
    if len(nodes) != 3:
        raise ConfigError(f"a plane is spanned by three networks, got {len(nodes)}")
    if resolution < 2:
        raise ConfigError(f"resolution is {resolution}, expected at least two points along each side")
    scorer = Scorer(model, nodes, data, **options)
    origin, across, up = (torch.cat([node[name].double().flatten() for name in scorer.names]) for node in nodes)
    width = float((across - origin).norm())
    along = float((up - origin) @ (across - origin)) / width if width else 0.0
    height = float((up - origin).square().sum() - along**2) ** 0.5 if width else 0.0
    if not height > 1e-9 * width > 0:
        raise ConfigError(
            "the three networks lie on one line, so they do not span a plane; pass three different networks"
        )
    x = _axis(min(0.0, along), max(width, along), resolution, margin)
    y = _axis(0.0, height, resolution, margin)
    loss, accuracy = torch.zeros(2, resolution, resolution, dtype=torch.float64)
    for row, column in itertools.product(range(resolution), range(resolution)):
        third = y[row] / height
        second = (x[column] - third * along) / width
        score = scorer.score((1 - second - third, second, third))
        loss[row, column], accuracy[row, column] = score.loss, score.accuracy
    return Landscape(tuple(x), tuple(y), ((0.0, 0.0), (width, 0.0), (along, height)), loss, accuracy)


def _axis(low: float, high: float, resolution: int, margin: float) -> list[float]:
    reach = margin * (high - low)
    return [low - reach + (high - low + 2 * reach) * index / (resolution - 1) for index in range(resolution)]
