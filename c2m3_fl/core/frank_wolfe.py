"""C2M3: cycle-consistent matching of many networks by Frank-Wolfe over all layers and all nodes at once.

Crisostomi, Fumero, Baieri, Bernard, Rodolà: "C2M3: Cycle-Consistent Multi-Model Merging" (NeurIPS 2024), Algorithm 1,
with sums over nodes instead of pairs of nodes, the exact step instead of a numerical search, and the relative duality
gap as the stopping rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.assignment import assignment_pool, oracle
from c2m3_fl.core.averaging import normalise_weights
from c2m3_fl.core.line_search import added, best_step, power_basis
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.polish import BlockAscent
from c2m3_fl.core.problem import Problem, canonical_order, check_nodes
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.starts import Start, check_start, start_point
from c2m3_fl.core.universe import Images, agreement_along, course, images_at_point
from c2m3_fl.errors import ConfigError

_SWEEPS = 100  # of the polish; it ends by itself after a handful


@dataclass(frozen=True)
class Step:
    """What a callback is told after every step.

    Attributes
    ----------
    step : int
        Number of the step, from 1.
    objective : float
        The agreement after it.
    gap : float
        The relative duality gap before it: no permutations are better by more, as far as the gradient sees.
    step_size : float
        How far it went towards the vertex, in [0, 1].
    share_moved : float
        Share of all units that the vertex moves away from their place.
    """

    step: int
    objective: float
    gap: float
    step_size: float
    share_moved: float


@dataclass(frozen=True)
class Match:
    """The result of `match`.

    Attributes
    ----------
    permutations : tuple of Permutation
        Each node's map into the universe, in the order in which the nodes were given.
    objectives : tuple of float
        The agreement at the start, after every step, and (last) at the permutations.
    gap : float
        Relative duality gap where Frank-Wolfe stopped.
    converged : bool
        Whether the gap reached the tolerance within the allowed steps.
    steps : int
        Number of Frank-Wolfe steps.
    order : tuple of int
        The nodes in an order that depends on their content alone, for sums that must not depend on the given one.
    """

    permutations: tuple[Permutation, ...]
    objectives: tuple[float, ...]
    gap: float
    converged: bool
    steps: int
    order: tuple[int, ...]

    def between(self, to: int, source: int) -> dict[str, Tensor]:
        """The map from node `source` to node `to`; around any cycle these maps compose to the identity."""
        return permutation.between(self.permutations[to], self.permutations[source])


def match(
    spec: PermutationSpec,
    nodes: Sequence[Params],
    *,
    weights: Sequence[float] | Tensor | None = None,
    start: Start = "identity",
    max_steps: int = 100,
    tolerance: float = 1e-4,
    polish: bool = True,
    generator: torch.Generator | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Match:
    """Permute every node into one shared universe, where their weighted agreement is as large as can be found.

    The result depends on the nodes' contents, not on their order. A node of weight zero takes no part in the
    agreement and is aligned with the others all the same.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    nodes : sequence of mappings of str to Tensor
        State dicts that fit the spec; not mutated. Integer tensors and buffers take no part.
    weights : sequence of float, optional
        Averaging weights; equal by default.
    start : {"identity", "barycentre", "sinkhorn", "random"} or sequence of Permutation
        Where the search starts; permutations are one per node, into a known universe.
    max_steps : int
        Upper limit of Frank-Wolfe steps.
    tolerance : float
        Stop when the duality gap is at most this share of ``sum_{i<j} w_i w_j |W_i| |W_j|``.
    polish : bool
        Whether to climb on, block by block, from the permutations that Frank-Wolfe ends at.
    generator : torch.Generator, optional
        Source of the "sinkhorn" and "random" starts; by default one with seed 0.
    callback : callable, optional
        Called with a `Step` after every step.

    Raises
    ------
    ParamsError
        For no nodes, or nodes that do not fit the spec or are not finite.
    WeightsError
        For weights that are negative, not finite, all zero or of the wrong number.
    ConfigError
        For an unknown start, a negative `max_steps` or a negative `tolerance`.
    """
    check_nodes(spec, nodes)
    share = normalise_weights(weights, len(nodes))
    check_start(spec, start, len(nodes))
    if max_steps < 0 or not tolerance >= 0:
        raise ConfigError(f"max_steps is {max_steps}, tolerance is {tolerance}; both must not be negative")
    order = canonical_order(spec, nodes, share, None if isinstance(start, str) else start)
    problem = Problem.of(spec, [nodes[i] for i in order], share[list(order)])
    begin = start_point(problem, start if isinstance(start, str) else [start[i] for i in order], generator)
    with torch.no_grad(), assignment_pool() as pool:
        walk = frank_wolfe(problem, begin, pool, max_steps=max_steps, tolerance=tolerance, callback=callback)
        vertex, final = to_permutations(problem, walk, pool, polish=polish)
    permutations: list[Permutation] = [{}] * len(nodes)
    for place, index in enumerate(order):
        permutations[index] = {name: rows[place].cpu() for name, rows in vertex.items()}
    objectives = (*walk.objectives, final)
    return Match(tuple(permutations), objectives, walk.gap, walk.converged, len(walk.objectives) - 1, order)


@dataclass(frozen=True, eq=False)
class Walk:
    """Where a Frank-Wolfe search has come to.

    Attributes
    ----------
    images : tuple of Images
        The images of every term at the last point.
    point : dict of str to Tensor, shape (nodes, size, size)
        The doubly stochastic matrices themselves.
    objectives : tuple of float
        The agreement at the start and after every step.
    gap : float
        Relative duality gap at the last point.
    converged : bool
        Whether the gap has reached the tolerance.
    """

    images: tuple[Images, ...]
    point: dict[str, Tensor]
    objectives: tuple[float, ...]
    gap: float
    converged: bool


def frank_wolfe(
    problem: Problem,
    point: dict[str, Tensor],
    pool: Executor,
    *,
    max_steps: int,
    tolerance: float,
    callback: Callable[[Step], None] | None = None,
) -> Walk:
    """C2M3 Algorithm 1 from `point`: all layers and all nodes at once."""
    images = tuple(images_at_point(term, point) for term in problem.terms)  # C2M3 Alg. 1, l. 1: initialise
    objectives = [problem.objective(images)]
    gap, scale = 0.0, max(problem.scale, torch.finfo(torch.float64).tiny)
    for number in range(max_steps + 1):  # l. 2: repeat
        gradient = problem.gradient(images)  # l. 3: the gradient, for every node and group
        vertex = oracle(problem.spec, gradient, pool)  # l. 4: the permutations that maximise its linear functional
        courses = [course(image, vertex) for image in images]
        polynomial = added([power_basis(agreement_along(path, problem.weights)) for path in courses])
        gap = max(polynomial[1], 0.0) / scale  # <gradient, vertex - point> is the slope towards the vertex
        if gap <= tolerance or number == max_steps:  # l. 7: until converged
            break
        step_size, gained = best_step(polynomial)  # l. 5: the line search, exactly
        images = tuple(path.at(step_size) for path in courses)  # l. 6: step towards the vertex
        point = {name: moved_towards(matrices, vertex[name], step_size) for name, matrices in point.items()}
        objectives.append(problem.constant + gained)
        if callback is not None:
            callback(Step(number + 1, objectives[-1], gap, step_size, _share_moved(vertex)))
    return Walk(images, point, tuple(objectives), gap, gap <= tolerance)


def to_permutations(problem: Problem, walk: Walk, pool: Executor, *, polish: bool) -> tuple[dict[str, Tensor], float]:
    """From the last point to permutations, losing nothing where the agreement is linear, and up from there."""
    vertex = {name: matrices.argmax(-1) for name, matrices in walk.point.items()}
    ascent = BlockAscent(problem.spec, walk.images, problem.weights, pool)
    if any(not _is_vertex(matrices) for matrices in walk.point.values()):
        ascent.sweep(vertex, soft=walk.point)
    for _ in range(_SWEEPS if polish else 0):
        if not ascent.sweep(vertex):
            break
    return vertex, problem.objective(ascent.images)


def moved_towards(matrices: Tensor, vertex: Tensor, step_size: float) -> Tensor:
    """``(1 - t) P + t S`` for permutations S in index form, shape (nodes, size)."""
    result = matrices * (1 - step_size)
    return result.scatter_add_(2, vertex[..., None], result.new_full((*vertex.shape, 1), step_size))


def _is_vertex(matrices: Tensor) -> bool:
    return bool(((matrices == 0) | (matrices == 1)).all())


def _share_moved(vertex: dict[str, Tensor]) -> float:
    moved = sum(int((index != torch.arange(index.shape[1], device=index.device)).sum()) for index in vertex.values())
    return moved / max(1, sum(index.numel() for index in vertex.values()))
