"""Barriers: how much worse the networks between given ones are, along a segment, over a simplex, across a plane."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.spec import Params, floating
from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.merging.setting import check_params
from c2m3_fl.models.calibration import Batch, Calibration, ExampleInputs, load_batches
from c2m3_fl.models.program import feeding


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy and accuracy on labelled data."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Segment:
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


@dataclass(frozen=True, eq=False)
class Landscape:
    """Scores across the plane through three networks.

    Attributes
    ----------
    x, y : tuple of float
        Coordinates of the grid's columns and rows, in the units of parameter space.
    corners : tuple of (float, float)
        Where the three networks are.
    loss, accuracy : Tensor of float64, shape (rows, columns)
        The scores.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    corners: tuple[tuple[float, float], ...]
    loss: Tensor
    accuracy: Tensor


def evaluate(model: nn.Module, params: Params, batches: Sequence[Batch]) -> Score:
    """Score a state dict on labelled batches.

    Raises
    ------
    CalibrationError
        When a batch has no labels, or the network cannot take it.
    """
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for batch in batches:
            if batch.labels is None:
                raise CalibrationError("barriers need labelled data: batches of (inputs, class indices)")
            with feeding(batch, params):
                logits = torch.func.functional_call(model, dict(params), batch.inputs)
                loss += float(nn.functional.cross_entropy(logits, batch.labels, reduction="sum"))
            correct += int((logits.argmax(1) == batch.labels).sum())
            count += len(batch.labels)
    return Score(loss / count, correct / count)


def barrier(
    model: nn.Module,
    first: Params,
    second: Params,
    data: Calibration,
    *,
    points: int = 11,
    example_inputs: ExampleInputs | None = None,
) -> Segment:
    """Score the segment between two networks.

    Parameters
    ----------
    model : nn.Module
        The architecture; not mutated.
    first, second : mapping of str to Tensor
        The ends, in one basis (or not, to see what that costs).
    data : iterable of labelled batches
        What to score on.
    points : int
        Number of equidistant points, ends included.
    example_inputs : Tensor or tuple of Tensor, optional
        A tuple says how many inputs the network takes; otherwise one.

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
    twin, batches = _ready(model, [first, second], data, example_inputs)
    positions = tuple(index / (points - 1) for index in range(points))
    scores = (evaluate(twin, weighted_mean([first, second], [1 - t, t]), batches) for t in positions)
    return Segment(positions, tuple(scores))


def pairwise_barriers(
    model: nn.Module, nodes: Sequence[Params], data: Calibration, *, points: int = 11
) -> dict[tuple[int, int], Segment]:
    """The segment between every pair of networks."""
    return {
        (i, j): barrier(model, nodes[i], nodes[j], data, points=points)
        for i, j in itertools.combinations(range(len(nodes)), 2)
    }


def simplex(
    model: nn.Module,
    nodes: Sequence[Params],
    data: Calibration,
    *,
    samples: int = 0,
    seed: int = 0,
    example_inputs: ExampleInputs | None = None,
) -> Simplex:
    """Score the corners and the centre of the simplex that many networks span, and points drawn uniformly from it.

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
    twin, batches = _ready(model, nodes, data, example_inputs)
    count = len(nodes)
    corners = [[float(row == column) for column in range(count)] for row in range(count)]
    drawn = -torch.rand(samples, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log()
    weights = [*corners, [1 / count] * count, *(drawn / drawn.sum(1, keepdim=True)).tolist()]
    scores = tuple(evaluate(twin, weighted_mean(nodes, each), batches) for each in weights)
    return Simplex(tuple(tuple(each) for each in weights), scores)


def landscape(
    model: nn.Module,
    nodes: Sequence[Params],
    data: Calibration,
    *,
    resolution: int = 21,
    margin: float = 0.25,
    example_inputs: ExampleInputs | None = None,
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
    example_inputs : Tensor or tuple of Tensor, optional
        A tuple says how many inputs the network takes; otherwise one.

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
        raise ConfigError(f"a plane goes through three networks, got {len(nodes)}")
    twin, batches = _ready(model, nodes, data, example_inputs)
    names = floating(nodes[0])
    origin, across, up = (torch.cat([node[name].double().flatten() for name in names]) for node in nodes)
    width = float((across - origin).norm())
    along = float((up - origin) @ (across - origin)) / width if width else 0.0
    height = float((up - origin).square().sum() - along**2) ** 0.5 if width else 0.0
    if not height > 1e-9 * width > 0:
        raise ConfigError("the three networks lie on one line, through which there are many planes")
    x = _axis(min(0.0, along), max(width, along), resolution, margin)
    y = _axis(0.0, height, resolution, margin)
    loss, accuracy = torch.zeros(2, resolution, resolution, dtype=torch.float64)
    for row, column in itertools.product(range(resolution), range(resolution)):
        third = y[row] / height
        second = (x[column] - third * along) / width
        score = evaluate(twin, _combined(nodes, names, (1 - second - third, second, third)), batches)
        loss[row, column], accuracy[row, column] = score.loss, score.accuracy
    return Landscape(tuple(x), tuple(y), ((0.0, 0.0), (width, 0.0), (along, height)), loss, accuracy)


def _axis(low: float, high: float, resolution: int, margin: float) -> list[float]:
    reach = margin * (high - low)
    return [low - reach + (high - low + 2 * reach) * index / (resolution - 1) for index in range(resolution)]


def _combined(nodes: Sequence[Params], names: Sequence[str], weights: Sequence[float]) -> dict[str, Tensor]:
    """Affine combination; unlike averaging weights these may be negative. Variances stay positive."""
    result = dict(nodes[0])
    for name in names:
        mixed = sum(
            (weight * node[name].double() for weight, node in zip(weights, nodes, strict=True)),
            torch.zeros_like(nodes[0][name], dtype=torch.float64),
        )
        result[name] = (mixed.clamp_min(0) if name.endswith("running_var") else mixed).to(nodes[0][name].dtype)
    return result


def _ready(
    model: nn.Module, nodes: Sequence[Params], data: Calibration, example_inputs: ExampleInputs | None
) -> tuple[nn.Module, tuple[Batch, ...]]:
    for index, node in enumerate(nodes):
        check_params(model, node, f"node {index}")
    device = next(iter(nodes[0].values())).device
    twin = copy.deepcopy(model).to(device).eval()
    return twin, load_batches(data, example_inputs=example_inputs, device=device)


def _dot(weights: Sequence[float], values: Sequence[float]) -> float:
    return sum(weight * value for weight, value in zip(weights, values, strict=True))
