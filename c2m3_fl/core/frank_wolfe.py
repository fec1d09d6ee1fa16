"""C2M3: cycle-consistent matching of many networks by Frank-Wolfe over all layers and all nodes at once.

Crisostomi, Fumero, Baieri, Bernard, Rodolà: "C2M3: Cycle-Consistent Multi-Model Merging" (NeurIPS 2024), Algorithm 1,
with sums over nodes instead of pairs of nodes, the exact step instead of a numerical search, and the relative duality
gap as the stopping rule. Its tail, where joint steps zig-zag, is left to the block-coordinate polish.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.assignment import assignment_pool, oracle
from c2m3_fl.core.averaging import normalise_weights
from c2m3_fl.core.line_search import added, best_step, power_basis
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.polish import climb
from c2m3_fl.core.problem import Problem, canonical_order, check_nodes, check_search
from c2m3_fl.core.result import Callback, Match, Step
from c2m3_fl.core.running import RunningUniverse
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.starts import Start, begin, check_start
from c2m3_fl.core.stationary import agreement_if_stationary
from c2m3_fl.core.universe import Images, share_moved

__all__ = ["Found", "Limits", "Match", "Step", "Walk", "frank_wolfe", "match", "search"]

_FADING = 0.01  # share of the whole rise below which the polish gains more than another two joint steps


@dataclass(frozen=True, eq=False)
class Walk:
    """Where a Frank-Wolfe search has come to.

    Attributes
    ----------
    images : list of Images
        The images of every term at the last point.
    point : dict of str to Tensor, shape (nodes, size, size)
        The doubly stochastic matrices themselves.
    objectives : tuple of float
        The agreement at the start and after every step.
    gap : float
        Relative duality gap at the last point.
    """

    images: list[Images]
    point: dict[str, Tensor]
    objectives: tuple[float, ...]
    gap: float


def match(
    spec: PermutationSpec,
    nodes: Sequence[Params],
    *,
    weights: Sequence[float] | Tensor | None = None,
    start: Start = "auto",
    max_steps: int = 100,
    tolerance: float = 1e-4,
    polish: bool = True,
    balance: bool = False,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
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
    start : {"auto", "identity", "profiles", "barycentre", "sinkhorn", "random"} or sequence of Permutation
        Where the search starts; permutations are one per node, into a known universe. "profiles" compares every
        node's units with those of one of the nodes, whatever they are connected to; "auto" is "profiles" where the
        nodes agree more there than as they stand, and "identity" otherwise.
    max_steps : int
        Upper limit of Frank-Wolfe steps.
    tolerance : float
        Stop when the duality gap is at most this share of ``sum_{i<j} w_i w_j |W_i| |W_j|``.
    polish : bool
        Whether to leave Frank-Wolfe when its steps fade and to climb on, block by block. Without it the steps go on
        until the gap closes, and the point is rounded to permutations once.
    balance : bool
        Whether every tensor counts the same, whatever its norm. The objectives are then those of the balanced
        agreement. It guards against one loud layer; on ordinary networks the plain agreement merges better.
    generator : torch.Generator, optional
        Source of the "sinkhorn" and "random" starts; by default one with seed 0.
    callback : callable, optional
        Called with a `Step` after every step and every sweep.

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
    check_search(max_steps, tolerance)
    order = canonical_order(spec, nodes, share, None if isinstance(start, str) else start)
    heavy = [i for i in order if share[i] > 0]
    if start in ("auto", "identity") and len(heavy) == len(nodes) and not balance:
        with torch.no_grad():
            here = agreement_if_stationary(spec, [nodes[i] for i in order], share[heavy])
        if here is not None:
            still = tuple(permutation.identity(spec) for _ in nodes)
            return Match(still, (here, here), 0.0, True, 0, order)
    with torch.no_grad(), assignment_pool() as pool:
        problem = Problem.of(spec, [nodes[i] for i in heavy], share[heavy], balance=balance)
        point, passed = begin(problem, start if isinstance(start, str) else [start[i] for i in heavy], generator)
        limits = Limits(max_steps, tolerance, polish)
        found = search(problem, point, pool, limits, callback)
        perms = dict(zip(heavy, found.permutations, strict=True))
        if len(heavy) < len(nodes):
            known = RunningUniverse(spec)
            for i in heavy:
                known.add(nodes[i], perms[i], float(share[i]))
            mean = known.mean(nodes[heavy[0]])
            for i in (i for i in order if share[i] == 0):
                alone = Problem.of(spec, [mean, nodes[i]], torch.full((2,), 0.5, dtype=torch.float64), frozen=1)
                point, _ = begin(alone, start if isinstance(start, str) else [start[i]], generator)
                perms[i] = search(alone, point, pool, limits).permutations[1]
    in_order = tuple(perms[i] for i in range(len(nodes)))
    objectives = (*passed, *found.objectives)
    return Match(in_order, objectives, found.gap, found.gap <= tolerance, found.steps, order)


@dataclass(frozen=True)
class Limits:
    """When a search ends; see `match`."""

    max_steps: int
    tolerance: float
    polish: bool


@dataclass(frozen=True)
class Found:
    """What a search has found: permutations of the problem's nodes, in its order, and the course of the agreement."""

    permutations: tuple[Permutation, ...]
    objectives: tuple[float, ...]
    gap: float
    steps: int


def search(
    problem: Problem, point: dict[str, Tensor], pool: Executor, limits: Limits, callback: Callback | None = None
) -> Found:
    """Frank-Wolfe from `point`, which moves along, and the climb from there."""
    fading = _FADING if limits.polish else 0.0
    walk = frank_wolfe(problem, point, pool, limits, fading=fading, callback=callback)
    vertex, objectives, gap = climb(
        problem, walk, pool, polish=limits.polish, tolerance=limits.tolerance, callback=callback
    )
    perms = tuple({name: rows[i].cpu() for name, rows in vertex.items()} for i in range(problem.count))
    return Found(perms, objectives, gap, len(walk.objectives) - 1)


def frank_wolfe(
    problem: Problem,
    point: dict[str, Tensor],
    pool: Executor,
    limits: Limits,
    *,
    fading: float = 0.0,
    callback: Callback | None = None,
) -> Walk:
    """C2M3 Algorithm 1 from `point`, which moves along.

    Stops early when two steps together gain less than `fading` of the whole rise.
    """
    images = [Images(term, point) for term in problem.terms]  # C2M3 Alg. 1, l. 1: initialise
    objectives = [problem.objective(images)]
    while True:  # l. 2: repeat
        # l. 3: the gradient, for every node and group; l. 4: the permutations that maximise its linear functional
        vertex = problem.whole(oracle(problem.spec, problem.gradient(images), pool))
        polynomial = added([power_basis(image.agreement_along(vertex, problem.weights)) for image in images])
        gap = max(polynomial[1], 0.0) / problem.unit  # <gradient, vertex - point> is the slope towards the vertex
        spent = len(objectives) > limits.max_steps or _fades(objectives, fading)
        if gap <= limits.tolerance or spent:  # l. 7: until converged
            return Walk(images, point, tuple(objectives), gap)
        step_size, gained = best_step(polynomial)  # l. 5: the line search, exactly
        for image in images:  # l. 6: step towards the vertex
            image.advance(vertex, step_size)
        for name, matrices in point.items():
            weight = torch.tensor(step_size).to(matrices).expand(*vertex[name].shape, 1)
            matrices.mul_(1 - step_size).scatter_add_(2, vertex[name][..., None], weight)
        objectives.append(problem.constant + gained)
        if callback is not None:
            callback(Step(len(objectives) - 1, objectives[-1], gap, step_size, share_moved(vertex)))


def _fades(objectives: Sequence[float], fading: float) -> bool:
    return len(objectives) > 3 and objectives[-1] - objectives[-3] <= fading * (objectives[-1] - objectives[0])
