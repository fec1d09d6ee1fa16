"""New nodes in a known universe, and matches of more nodes than fit into memory.

The known nodes enter only through their weighted mean, a frozen node of their total weight that stays where it is.
Joining costs as much as a match of the new nodes alone, and leaves the others' permutations as they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.assignment import assignment_pool
from c2m3_fl.core.averaging import normalise_weights
from c2m3_fl.core.identity_proof import prove_identity
from c2m3_fl.core.match import match
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.problem import Problem, check_nodes, check_search
from c2m3_fl.core.result import Callback, Limits, Match
from c2m3_fl.core.running import RunningUniverse
from c2m3_fl.core.search import duality_gap, search
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.starts import Start, begin, check_start
from c2m3_fl.core.state_dicts import order_by_units
from c2m3_fl.core.stillness import still_gap
from c2m3_fl.errors import ConfigError, ParamsError, WeightsError


def join(
    spec: PermutationSpec,
    universe: Params,
    nodes: Sequence[Params],
    *,
    universe_weight: float | None = None,
    weights: Sequence[float] | Tensor | None = None,
    start: Start = "auto",
    max_steps: int = 100,
    tolerance: float = 1e-4,
    polish: bool = True,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    max_seconds: float | None = None,
) -> Match:
    """Bring new nodes into a known universe, which stays where it is.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    universe : mapping of str to Tensor
        Weighted mean of the known nodes, in the universe.
    nodes : sequence of mappings of str to Tensor
        The nodes that join; not mutated.
    universe_weight : float, optional
        The known nodes' weight together, on the scale of `weights`; by default that of all joining nodes.
    weights : sequence of float, optional
        The joining nodes' weights, all positive; one each by default.
    start, max_steps, tolerance, polish, generator, callback, max_seconds
        See `match`; a start of permutations has one for every joining node.

    Returns
    -------
    Match
        The joining nodes' maps into the universe; its agreement includes that with the universe.

    Raises
    ------
    ParamsError, WeightsError, ConfigError
        See `match`; also when the universe does not fit, or a weight is not positive.
    """
    check_nodes(spec, nodes)
    check_nodes(spec, [universe])
    check_start(spec, start, len(nodes))
    check_search(max_steps, tolerance, max_seconds=max_seconds)
    limits = Limits(max_steps, tolerance, polish, deadline=_deadline(max_seconds))
    own = [1.0] * len(nodes) if weights is None else [float(weight) for weight in weights]
    together = sum(own) if universe_weight is None else universe_weight
    share = normalise_weights([together, *own], len(nodes) + 1)
    if not bool((share > 0).all()):
        raise WeightsError(f"weights are {own} and the universe's {together}, expected all of them positive")
    order = order_by_units(spec, nodes, share[1:], None if isinstance(start, str) else start)
    first = start if isinstance(start, str) else [start[i] for i in order]
    with torch.no_grad(), assignment_pool() as pool:
        ordered = [nodes[i] for i in order]
        problem = Problem.of(spec, [universe, *ordered], share[[0, *(i + 1 for i in order)]], frozen=1)
        if spec.rotations and start == "auto" and (gap := still_gap(problem, pool, tolerance)) is not None:
            still = (permutation.identity(spec),) * len(nodes)
            return Match(still, (problem.objective(),) * 2, gap, 0.0, True, 0, order)
        point, passed = begin(problem, first, generator, pool)
        found = search(problem, point, pool, limits, callback)
        late = limits.over
        gap = math.inf if late else duality_gap(problem, found.permutations, pool)
    perms = dict(zip(order, found.permutations[1:], strict=True))
    in_order = tuple(perms[i] for i in range(len(nodes)))
    return Match(in_order, (*passed, *found.objectives), gap, found.gain, gap <= tolerance, found.steps, order, late)


def _deadline(max_seconds: float | None) -> float:
    return math.inf if max_seconds is None else time.monotonic() + max_seconds


# Of a bounded match. Each pass of single nodes costs .3 to .4 of a whole match. Agreement lost to a whole match, in
# batches of six of 60 MLPs and of 24 ResNet20: 1.8 and 1.1 % after one pass, .9 and .5, .6 and .3, .4 and .1 % after
# four.
PASSES = 4

_LEAST = 1e-9  # of the largest weight: nodes count as much at least, or sums in double precision lose them


@dataclass(frozen=True)
class BatchMatch:
    """The result of `match_in_batches`.

    Attributes
    ----------
    permutations : tuple of Permutation
        Each node's map into the universe, in the order of the nodes.
    universe : mapping of str to Tensor
        The nodes' weighted mean there.
    objective : float
        The weighted agreement over all pairs of nodes.
    timed_out : bool
        Whether `max_seconds` ended it.
    """

    permutations: tuple[Permutation, ...]
    universe: dict[str, Tensor]
    objective: float
    timed_out: bool = False


def match_in_batches(
    spec: PermutationSpec,
    nodes: Sequence[Params],
    *,
    batch: int,
    weights: Sequence[float] | Tensor | None = None,
    passes: int = 1,
    max_steps: int = 100,
    tolerance: float = 1e-4,
    max_seconds: float | None = None,
) -> BatchMatch:
    """Match any number of nodes, `batch` of them in memory at a time.

    The first batch is matched by itself; every further one joins the universe of those before it. In each further pass
    every node joins again, by itself, the universe of all the others. Besides a batch (and what `match` needs for it)
    two models are held: the running sum and the running mean. The nodes are taken in the given order.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    nodes : sequence of mappings of str to Tensor
        State dicts; the sequence may load them as they are asked for.
    batch : int
        How many nodes are matched together.
    weights : sequence of float, optional
        Averaging weights, all positive; equal by default. Below a billionth of the largest they count as that.
    passes : int
        How often every node is matched.
    max_steps, tolerance, max_seconds : int, float, float
        See `match`. Nodes that have not been matched when the time is up stay as they are.

    Raises
    ------
    ConfigError
        For a batch below two or less than one pass.
    ParamsError, WeightsError
        See `match`; also for weights of zero.
    """
    if batch < 2 or passes < 1:
        raise ConfigError(f"batch is {batch}, passes is {passes}; expected at least 2 and at least 1")
    if not nodes:
        raise ParamsError("nodes: got none, expected at least one state dict to match")
    share = normalise_weights(weights, len(nodes)).tolist()
    if min(share) <= 0:
        raise WeightsError("weights: every node of a match in batches needs a positive weight")
    least = _LEAST * max(share)
    share = [max(each, least) for each in share]
    check_search(max_steps, tolerance, max_seconds=max_seconds)
    limits = Limits(max_steps, tolerance, polish=True, deadline=_deadline(max_seconds))
    total = RunningUniverse(spec)
    perms: list[Permutation] = [permutation.identity(spec)] * len(nodes)
    for turn in range(passes):
        for places in _batches(len(nodes), batch if turn == 0 else 1):
            some, own = [nodes[i] for i in places], [share[i] for i in places]
            if turn > 0 and limits.over:
                break
            if turn > 0:
                for node, i in zip(some, places, strict=True):
                    total.add(node, perms[i], -share[i])
            alone = len(places) == len(nodes) or (turn == 0 and places.start == 0)
            if not limits.over:
                found = _match_batch(spec, None if alone else total, some, own, [perms[i] for i in places], limits)
                perms[places.start : places.stop] = found.permutations
            for node, i in zip(some, places, strict=True):
                total.add(node, perms[i], share[i])
    return BatchMatch(tuple(perms), total.mean(nodes[0]), total.agreement(nodes, share), limits.over)


def match_bounded(
    spec: PermutationSpec,
    nodes: Sequence[Params],
    weights: Sequence[float],
    batch: int,
    *,
    max_steps: int = 100,
    tolerance: float = 1e-4,
    max_seconds: float | None = None,
) -> Match:
    """`match_in_batches` as a match: the nodes in an order of their own, none of them moved where that is proven.

    Parameters
    ----------
    spec, nodes, weights, batch, max_steps, tolerance, max_seconds
        See `match_in_batches`.

    Returns
    -------
    Match
        Its gap is infinite, because nothing measures that of all nodes together.
    """
    share = normalise_weights(weights, len(nodes))
    share = share.clamp(min=_LEAST * float(share.max()))  # of weights that are zero beside the largest, too
    order = order_by_units(spec, nodes, share)
    ordered, own = [nodes[i] for i in order], share[list(order)]
    with torch.no_grad():
        here = prove_identity(spec, ordered, own)
    if here is not None:
        still = tuple(permutation.identity(spec) for _ in nodes)
        return Match(still, (here, here), 0.0, 0.0, True, 0, order)
    found = match_in_batches(
        spec,
        ordered,
        batch=batch,
        weights=own,
        passes=PASSES,
        max_steps=max_steps,
        tolerance=tolerance,
        max_seconds=max_seconds,
    )
    before = RunningUniverse(spec)
    for node, weight in zip(ordered, own.tolist(), strict=True):
        before.add(node, permutation.identity(spec), weight)
    perms = dict(zip(order, found.permutations, strict=True))
    objectives = before.agreement(ordered, own.tolist()), found.objective
    return Match(
        tuple(perms[i] for i in range(len(nodes))), objectives, math.inf, 0.0, False, 0, order, found.timed_out
    )


def _match_batch(
    spec: PermutationSpec,
    known: RunningUniverse | None,
    nodes: Sequence[Params],
    weights: Sequence[float],
    start: Sequence[Permutation],
    limits: Limits,
) -> Match:
    """Match a batch by itself, or into a known universe."""
    first: Start = "auto" if all(permutation.is_identity(perm) for perm in start) else start
    rest = None if limits.deadline == math.inf else max(limits.deadline - time.monotonic(), 0.0)
    steps, tolerance = limits.max_steps, limits.tolerance
    if known is None:
        return match(spec, nodes, weights=weights, start=first, max_steps=steps, tolerance=tolerance, max_seconds=rest)
    return join(
        spec,
        known.mean(nodes[0]),
        nodes,
        universe_weight=known.weight,
        weights=weights,
        start=first,
        max_steps=steps,
        tolerance=tolerance,
        max_seconds=rest,
    )


def _batches(count: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, count)) for first in range(0, count, size))
