"""The agreement of all nodes in the universe: its value, its gradient, and its exact course along a step.

With U_i the parameters of node i mapped into the universe and M = sum_i w_i U_i,

    f = sum_{i<j} w_i w_j <U_i, U_j> = (|M|^2 - sum_i w_i^2 |U_i|^2) / 2,

so value, gradient and step cost O(nodes). Every term keeps the *images* of its parameters: for each subset Q
of its grouped axes (a bit mask) the tensor X_Q with just the axes in Q mapped. X_0 is the node's own tensor, the
full image is U, and the image on all axes but one is what the gradient along that axis multiplies. Towards a vertex
(permutations S) all images move as polynomials,

    X_Q(t) = sum_{T in Q} (1 - t)^|Q - T| t^|T| S_T(X_{Q - T}),

whose coefficients are gathers; the only matrix products are the contractions of the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core.terms import Term

_SLICE = 1 << 18  # numbers that inner products widen to float64 at a time: stays in cache

Vertex = Mapping[str, Tensor]  # per group the index forms of all nodes, shape (nodes, size)
Point = Mapping[str, Tensor]  # per group the matrix forms of all nodes, shape (nodes, size, size)


@dataclass(frozen=True, eq=False)
class Images:
    """A term and its images at one point of the search; `maps[Q]` has the axes in bit mask Q mapped."""

    term: Term
    maps: tuple[Tensor, ...]

    @property
    def universe(self) -> Tensor:
        """All axes mapped: the nodes in the universe."""
        return self.maps[-1]


@dataclass(frozen=True, eq=False)
class Course:
    """The polynomials that a term's images follow from a point (t = 0) to a vertex (t = 1).

    ``coefficients[Q][q]`` belongs to ``(1 - t)^(|Q| - q) t^q``.
    """

    term: Term
    coefficients: tuple[tuple[Tensor, ...], ...]

    def at(self, step_size: float) -> Images:
        """The images at `step_size`."""
        if step_size == 1.0:
            return Images(self.term, tuple(parts[-1] for parts in self.coefficients))
        return Images(self.term, tuple(_mix(parts, step_size) for parts in self.coefficients))


def images_at_vertex(term: Term, vertex: Vertex) -> Images:
    """Images at permutations."""
    maps = [term.value]
    for mask in range(1, 1 << len(term.groups)):
        axis = mask.bit_length() - 1
        maps.append(gather(maps[mask & ~(1 << axis)], term.dim(axis), vertex[term.groups[axis]]))
    return Images(term, tuple(maps))


def images_at_point(term: Term, point: Point) -> Images:
    """Images at doubly stochastic matrices."""
    maps = [term.value]
    for mask in range(1, 1 << len(term.groups)):
        axis = mask.bit_length() - 1
        maps.append(_multiply(maps[mask & ~(1 << axis)], term.dim(axis), point[term.groups[axis]]))
    return Images(term, tuple(maps))


def course(images: Images, vertex: Vertex) -> Course:
    """The course of the images towards a vertex."""
    term = images.term
    steps: dict[tuple[int, int], Tensor] = {(mask, 0): value for mask, value in enumerate(images.maps)}

    def mapped(at_point: int, at_vertex: int) -> Tensor:
        """The tensor with the axes in `at_point` mapped by the point and those in `at_vertex` by the vertex."""
        if (at_point, at_vertex) not in steps:
            axis = at_vertex.bit_length() - 1
            inner = mapped(at_point, at_vertex & ~(1 << axis))
            steps[at_point, at_vertex] = gather(inner, term.dim(axis), vertex[term.groups[axis]])
        return steps[at_point, at_vertex]

    coefficients = []
    for mask in range(1 << len(term.groups)):
        parts: list[Tensor | None] = [None] * (mask.bit_count() + 1)
        for subset in _subsets(mask):
            tensor, degree = mapped(mask & ~subset, subset), subset.bit_count()
            previous = parts[degree]
            parts[degree] = tensor if previous is None else previous + tensor
        coefficients.append(tuple(part for part in parts if part is not None))
    return Course(term, tuple(coefficients))


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Sum over the nodes, shape (...) from (nodes, ...)."""
    flat = weights.to(values) @ values.reshape(len(values), -1)
    return flat.reshape(values.shape[1:])


def agreement(images: Images, weights: Tensor) -> float:
    """The term's part in f."""
    universe = images.universe
    mean = weighted_sum(universe, weights)
    squares = weights.square().tolist()
    total = inner(mean, mean)
    for square, own in zip(squares, universe, strict=True):
        total -= square * inner(own, own)
    return 0.5 * total


def agreement_along(path: Course, weights: Tensor) -> list[float]:
    """The term's part in f along a course: coefficients of (1 - t)^(2k - s) t^s for s = 0 ... 2k."""
    parts = path.coefficients[-1]
    means = [weighted_sum(part, weights) for part in parts]
    squares = weights.square().tolist()
    result = [0.0] * (2 * len(parts) - 1)
    for first, left in enumerate(parts):
        for second in range(first, len(parts)):
            value = inner(means[first], means[second])
            value -= sum(w * inner(a, b) for w, a, b in zip(squares, left, parts[second], strict=True))
            result[first + second] += 0.5 * value * (1 if first == second else 2)
    return result


def gradient(images: Images, weights: Tensor, into: dict[str, Tensor]) -> None:
    """Add the term's gradient to `into`: per group shape (nodes, size, size), each node's divided by its own weight."""
    term, universe = images.term, images.universe
    others = weighted_sum(universe, weights) - weights.to(universe).view(-1, *[1] * (universe.ndim - 1)) * universe
    for axis, group in enumerate(term.groups):
        rest = images.maps[(len(images.maps) - 1) & ~(1 << axis)]
        into[group] += contract(others, rest, term.dim(axis))


def contract(left: Tensor, right: Tensor, dim: int) -> Tensor:
    """``out[i, u, a] = sum left[i, .., u, ..] right[i, .., a, ..]`` over every dimension but the nodes' and `dim`."""
    count, size = len(left), left.shape[dim]
    if dim == left.ndim - 1 and dim > 1:
        return left.reshape(count, -1, size).transpose(1, 2) @ right.reshape(count, -1, size)
    left, right = (tensor.movedim(dim, 1).reshape(count, size, -1) for tensor in (left, right))
    return left @ right.transpose(1, 2)


def gather(values: Tensor, dim: int, index: Tensor) -> Tensor:
    """Permute dimension `dim` of every node by that node's row of `index`, shape (nodes, size)."""
    count, size = index.shape
    if dim == values.ndim - 1 and dim > 1:
        view = index.view(count, *[1] * (values.ndim - 2), size)
        return values.gather(dim, view.expand(values.shape))
    before, after = values.shape[1:dim].numel(), values.shape[dim + 1 :].numel()
    rows = torch.arange(count * before, device=index.device).view(count, before, 1) * size + index.view(count, 1, size)
    return values.reshape(count * before * size, after).index_select(0, rows.reshape(-1)).view(values.shape)


def inner(left: Tensor, right: Tensor) -> float:
    """Inner product, accumulated in float64."""
    left, right = left.reshape(-1), right.reshape(-1)
    if left.dtype == torch.float64:
        return float(left @ right)
    total = 0.0
    for start in range(0, len(left), _SLICE):
        part = slice(start, start + _SLICE)
        total += float(left[part].double() @ right[part].double())
    return total


def _mix(parts: Sequence[Tensor], step_size: float) -> Tensor:
    degree = len(parts) - 1
    if degree == 0:
        return parts[0]
    result = parts[0] * (1 - step_size) ** degree
    for power, part in enumerate(parts[1:], start=1):
        result.add_(part, alpha=(1 - step_size) ** (degree - power) * step_size**power)
    return result


def _multiply(values: Tensor, dim: int, matrices: Tensor) -> Tensor:
    moved = values.movedim(dim, 1)
    product = matrices @ moved.reshape(*moved.shape[:2], -1)
    return product.reshape(moved.shape).movedim(1, dim).contiguous()


def _subsets(mask: int) -> list[int]:
    return [subset for subset in range(mask + 1) if subset & ~mask == 0]
