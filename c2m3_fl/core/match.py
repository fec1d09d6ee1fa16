"""The front door of the matcher: nodes in, one permutation per node into a shared universe out."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.assignment import assignment_pool
from c2m3_fl.core.averaging import normalise_weights
from c2m3_fl.core.identity_proof import prove_identity
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.problem import Problem, check_nodes, check_search
from c2m3_fl.core.result import Callback, Limits, Match
from c2m3_fl.core.running import RunningUniverse
from c2m3_fl.core.search import duality_gap, search
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.starts import Start, begin, check_start
from c2m3_fl.core.state_dicts import order_by_units
from c2m3_fl.core.stillness import still_gap


def match(
    spec: PermutationSpec,
    nodes: Sequence[Params],
    *,
    weights: Sequence[float] | Tensor | None = None,
    start: Start = "auto",
    max_steps: int = 100,
    tolerance: float = 1e-4,
    polish: bool = True,
    together: int | None = 1,
    balance: bool = False,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    max_seconds: float | None = None,
) -> Match:
    """Permute every node into one shared universe so that their weighted agreement is as large as can be found.

    The agreement is ``f = sum_{i<j} w_i w_j <U_i, U_j>``, where U_i are the parameters of node i in the universe.
    Nodes of weight zero have no influence on the others and are aligned with them afterwards. Groups that are
    orthogonal rotate instead.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    nodes : sequence of mappings of str to Tensor
        State dicts that fit the spec; not mutated. Integer tensors and buffers are no part of the agreement.
    weights : sequence of float, optional
        Averaging weights; equal by default.
    start : {"auto", "identity", "profiles", "barycentre", "sinkhorn", "random"} or sequence of Permutation
        Where the search starts; permutations are one per node, into a known universe. "profiles" compares every
        node's units with those of one of the nodes, whatever they are connected to; "auto" is "profiles" where the
        nodes agree more there than as they stand, and "identity" otherwise. Where groups rotate, "auto" moves nothing
        if permutations gain at most the tolerance as the nodes stand and every rotation less than one unit agrees on
        average, and starts from the barycentre otherwise.
    max_steps : int
        Upper limit of Frank-Wolfe steps; one is a pass over all nodes. Every reheating may take two more.
    tolerance : float
        Stop when the duality gap is at most this share of ``sum_{i<j} w_i w_j |W_i| |W_j|``.
    polish : bool
        Whether to leave Frank-Wolfe when its gains fade, to climb on block by block, and with more than three nodes
        to reheat. Without it the steps go on until the gap closes, and the point is rounded to permutations once.
    together : int, optional
        How many nodes step at once; None for all of them, as in the paper.
    balance : bool
        Whether every tensor has the same weight in the agreement, whatever its norm; the objectives are then those of
        the balanced agreement. It helps where the norm of one layer dwarfs the others'; on ordinary networks the plain
        agreement merges better.
    generator : torch.Generator, optional
        Source of the "sinkhorn" and "random" starts; by default one with seed 0.
    callback : callable, optional
        Called with a `Step` after every step, every sweep, every step of a reheating (``step.trial``) and every
        reheating that gained.
    max_seconds : float, optional
        When to end the search by the clock, at the best permutations so far; it may last one pass over the nodes
        longer. A result that this ends says ``timed_out``: another run may give another one. By default nothing ends
        it but the other limits, and the result is reproducible.

    Returns
    -------
    Match
        The permutations, the course of the agreement, and the duality gap at the end.

    Raises
    ------
    ParamsError
        For no nodes, or nodes that do not fit the spec, are not finite, or so large that the agreement overflows.
    WeightsError
        For weights that are negative, not finite, all zero or of the wrong number.
    ConfigError
        For an unknown start, a negative `max_steps`, `tolerance` or `max_seconds`, or a `together` below one.

    Notes
    -----
    The result depends on the contents of the nodes, not on their order. It is a local optimum: the global one is
    unknown for independently trained networks. Where a tensor carries a family of groups on two axes (recurrent
    weights, residual streams in one term) the search may end with a gap above the tolerance; then ``converged`` is
    False although no single family of a single node can improve.

    Assignment problems are solved by a pool of threads beside torch's own. Where cores are busy, torch's waiting
    threads take the cores from the pool, and a match may be twenty times slower: set ``OMP_WAIT_POLICY=PASSIVE``
    before torch is imported. Importing ``c2m3_fl`` before torch does it unless the variable is set already.

    Examples
    --------
    Two copies of one layer, the second one with its units in another order:

    >>> import torch
    >>> from c2m3_fl.core import Group, PermutationSpec, Segment, TensorSpec, match, permutation
    >>> units = (Segment.contiguous("hidden", 3),)  # the rows are units, the columns are inputs and stay
    >>> spec = PermutationSpec({"hidden": Group(3)}, {"weight": TensorSpec((3, 2), (units, ()))})
    >>> a = {"weight": torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])}
    >>> b = {"weight": a["weight"][[2, 0, 1]]}
    >>> found = match(spec, [a, b])
    >>> found.between(0, 1)["hidden"]  # unit u of node 0 is unit [u] of node 1
    tensor([1, 2, 0])
    >>> torch.equal(permutation.apply(spec, found.between(0, 1), b)["weight"], a["weight"])
    True
    >>> found.converged
    True

    A state dict of another network is refused, with what differs:

    >>> match(spec, [a, {"weight": torch.zeros(4, 2)}])
    Traceback (most recent call last):
        ...
    c2m3_fl.errors.ParamsError: node 1: 'weight' has shape (4, 2), expected (3, 2)

    A search that is cut short says so. Give it more steps, or leave ``polish`` on:

    >>> generator = torch.Generator().manual_seed(0)
    >>> units = (Segment.contiguous("hidden", 16),)
    >>> wide = PermutationSpec({"hidden": Group(16)}, {"weight": TensorSpec((16, 8), (units, ()))})
    >>> nodes = [{"weight": torch.randn(16, 8, generator=generator)} for _ in range(3)]
    >>> match(wide, nodes, max_steps=0, polish=False).converged
    False
    >>> match(wide, nodes).converged
    True
    """
    check_nodes(spec, nodes)
    share = normalise_weights(weights, len(nodes))
    check_start(spec, start, len(nodes))
    check_search(max_steps, tolerance, together, max_seconds)
    deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
    order = order_by_units(spec, nodes, share, None if isinstance(start, str) else start)
    if not isinstance(start, str) and all(permutation.is_identity(perm) for perm in start):
        start = "identity"
    if start in ("auto", "identity") and bool((share > 0).all()) and not balance:
        with torch.no_grad():
            here = prove_identity(spec, [nodes[i] for i in order], share[list(order)])
        if here is not None:
            still = tuple(permutation.identity(spec) for _ in nodes)
            return Match(still, (here, here), 0.0, 0.0, True, 0, order)
    limits = Limits(max_steps, tolerance, polish, together, deadline)
    setting = _Setting(spec, nodes, share, start, limits, balance, generator)
    with torch.no_grad(), assignment_pool() as pool:
        return setting.match(order, pool, callback)


@dataclass(frozen=True, eq=False)
class _Setting:
    """A match whose arguments have been checked."""

    spec: PermutationSpec
    nodes: Sequence[Params]
    share: Tensor
    start: Start
    limits: Limits
    balance: bool
    generator: torch.Generator | None

    def match(self, order: tuple[int, ...], pool: Executor, callback: Callback | None) -> Match:
        """Match the nodes of positive weight with each other, and align the rest with their mean."""
        heavy = [i for i in order if self.share[i] > 0]
        problem = Problem.of(self.spec, [self.nodes[i] for i in heavy], self.share[heavy], balance=self.balance)
        if self.spec.rotations and self.start == "auto" and len(heavy) == len(order):
            still = (permutation.identity(self.spec),) * len(order)
            if (gap := still_gap(problem, pool, self.limits.tolerance)) is not None:
                return Match(still, (problem.objective(),) * 2, gap, 0.0, True, 0, order)
        point, passed = begin(problem, self._start(heavy), self.generator, pool)
        found = search(problem, point, pool, self.limits, callback)
        late = self.limits.over
        gap = math.inf if late else duality_gap(problem, found.permutations, pool)
        perms = dict(zip(heavy, found.permutations, strict=True))
        if len(heavy) < len(order):
            perms |= self._align_weightless([i for i in order if self.share[i] == 0], perms, pool)
        in_order = tuple(perms[i] for i in range(len(order)))
        objectives = (*passed, *found.objectives)
        return Match(in_order, objectives, gap, found.gain, gap <= self.limits.tolerance, found.steps, order, late)

    def _align_weightless(
        self, light: Sequence[int], perms: dict[int, Permutation], pool: Executor
    ) -> dict[int, Permutation]:
        """Match each node of weight zero to the mean of the others in the universe."""
        known = RunningUniverse(self.spec)
        for i, perm in perms.items():
            known.add(self.nodes[i], perm, float(self.share[i]))
        mean, halves = known.mean(self.nodes[next(iter(perms))]), torch.full((2,), 0.5, dtype=torch.float64)
        found = {}
        for i in light:
            alone = Problem.of(self.spec, [mean, self.nodes[i]], halves, frozen=1, balance=self.balance)
            point, _ = begin(alone, self._start([i]), self.generator, pool)
            found[i] = search(alone, point, pool, self.limits).permutations[1]
        return found

    def _start(self, places: Sequence[int]) -> Start:
        return self.start if isinstance(self.start, str) else [self.start[i] for i in places]
