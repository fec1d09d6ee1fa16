"""Bring the replies of a round into one basis: shared by the current and the legacy dialect."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from logging import WARNING
from typing import Literal

import torch
from flwr.supercore import log

from c2m3_fl.core import permutation
from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.basis import bounded_weights, closest, consensus, consensus_of, into_basis
from c2m3_fl.core.joining import match_bounded
from c2m3_fl.core.match import match
from c2m3_fl.core.outliers import outliers_of
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.result import Match
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.starts import Start
from c2m3_fl.core.state_dicts import to_device
from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.aligning.memory import Memory
from c2m3_fl.flower.aligning.out_of_memory import with_cpu_fallback
from c2m3_fl.flower.aligning.progress import MatchLog
from c2m3_fl.flower.arriving.ahead import Seen
from c2m3_fl.flower.incoming.carried import carried
from c2m3_fl.flower.round_match import RoundMatch

Mode = Literal["joint", "separate"]
Basis = Literal["global", "largest", "client"] | int
SecondStart = Callable[[Sequence[Params], Sequence[float]], Sequence[Permutation] | None]

# Share of moved units beyond which a reply has come from another basis: feedback="moved" trains the deployed model, and
# deep networks are matched from their activations as well. About the geometric mean of the largest share of a round
# from a shared start (.194, two classes a client, 5 epochs; else at most .094) and the smallest of a first round from
# own starts (.953). Digits, MLP 64-32-32-10, 5 clients, IID, Dirichlet .1 and two classes, 1 and 5 local epochs,
# learning rates .1 and .02, 8 rounds, seeds 10 and 11, which no table shows.
MOVED = 0.4
_MODELS = 2  # that a match holds for every node, with a margin: see `tests.core.test_memory`


@dataclass(frozen=True)
class _Found:
    """Maps into the basis of the model that was sent out, and the solver's numbers."""

    moves: Sequence[Permutation]
    objectives: tuple[float, float]
    gap: float
    gain: float
    steps: int
    timed_out: bool = False


class Aligner:
    """Aligns the replies of one round after another, remembering where each node was found.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    mode : {"joint", "separate"}
        Match all replies with each other, or each one only with the model that was sent out: then no client's
        permutation depends on another client, as differential privacy needs it.
    basis : {"global", "largest", "client"} or int
        Where the aligned replies end up: in the basis of the model that was sent out ("global", and "client",
        where every client is sent the model in its own), or in that of the reply of largest weight or of the
        node of that id; when that node did not reply, the global basis.
    memory : int
        How many nodes to remember between rounds.
    device : torch.device
        Where to compute.
    max_steps, tolerance : int, float
        See `match`.
    max_seconds : float, optional
        When to end the search of a round by the clock.
    memory_limit : int, optional
        Bytes that a match may take beside the replies: more replies are matched in batches, see `match_in_batches`.
    second_start : callable, optional
        From replies and weights to where a joint match starts a second time after it moved many units; None where it
        does not.
    fold : callable, optional
        From a state dict to the folded one whose rotations `spec` describes (`fold`); None for permutations alone.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        *,
        mode: Mode,
        basis: Basis,
        memory: int,
        device: torch.device,
        max_steps: int,
        tolerance: float,
        max_seconds: float | None = None,
        memory_limit: int | None = None,
        second_start: SecondStart | None = None,
        fold: Callable[[Params], Params] | None = None,
    ) -> None:
        if mode not in ("joint", "separate"):
            raise ConfigError(f"alignment is {mode!r}, expected 'joint' or 'separate'")
        if isinstance(basis, bool) or not (isinstance(basis, int) or basis in ("global", "largest", "client")):
            raise ConfigError(f"basis is {basis!r}, expected 'global', 'largest', 'client' or a node id")
        self.spec = spec
        self.mode = mode
        self.basis: Basis = basis
        self.memory = Memory(spec, memory)
        self.device = device
        self.max_steps = max_steps
        self.tolerance = tolerance
        self.max_seconds = max_seconds
        self.memory_limit = memory_limit
        self.second_start = second_start
        self.fold = fold
        self._deadline = math.inf

    def align(
        self,
        nodes: Sequence[int],
        params: Sequence[Params],
        weights: Sequence[float],
        sent: Params,
        seen: Seen | None = None,
    ) -> RoundMatch:
        """Bring the replies of `nodes` into one basis, and remember it.

        Parameters
        ----------
        nodes : sequence of int
            Who replied.
        params : sequence of mappings of str to Tensor
            Their state dicts, in a stable order; not mutated.
        weights : sequence of float
            Their averaging weights, positive.
        sent : mapping of str to Tensor
            The global model that was sent out.
        seen : Seen, optional
            The replies next to that model, where none of them moved far from it.
        """
        started = time.perf_counter()
        self._deadline = math.inf if self.max_seconds is None else time.monotonic() + self.max_seconds
        find = self._jointly if self.mode == "joint" else self._separately
        given, start = params, sent
        if self.fold is not None:
            params, sent = [self.fold(reply) for reply in params], self.fold(sent)
        still, on_cpu = None if seen is None else self._still(nodes, weights, seen), False
        if still is not None:
            found = still
        else:
            found, on_cpu = with_cpu_fallback(
                lambda device: find(
                    nodes, [to_device(node, device) for node in params], weights, to_device(sent, device)
                ),
                self.device,
                "matching",
            )
        moves, origin = self._rebased(nodes, weights, found.moves)
        stay = all(map(permutation.is_identity, {id(each): each for each in (*moves, origin)}.values()))
        for node, move in zip(nodes, moves, strict=True) if still is None else ():
            self.memory.remember(node, move)
        if stay:
            aligned = tuple(given)  # the replies as they were, bit for bit
        else:
            each = zip(moves, params, given, strict=True)
            aligned = tuple(carried(_moved(self.spec, move, reply), as_it_came) for move, reply, as_it_came in each)
            start = _moved(self.spec, origin, sent)
        products = seen.products() if seen is not None and stay else None
        agreed = consensus(self.spec, aligned, weights) if products is None else consensus_of(products, weights)
        odd = None if products is None else outliers_of(products)
        seconds = time.perf_counter() - started
        numbers = found.objectives, found.gap, found.gain, found.steps, seconds, on_cpu, found.timed_out
        return RoundMatch(aligned, tuple(moves), start, agreed, *numbers, odd)

    def own_basis(self, node: int, params: Params) -> Params:
        """The global model in the basis in which a node was last found."""
        perm = self.memory.recall(node)
        if perm is None:
            return params
        params = params if self.fold is None else self.fold(params)
        return permutation.apply(self.spec, permutation.invert(perm), params)

    def _located(self, nodes: Sequence[int], params: Sequence[Params], sent: Params) -> list[Permutation]:
        """For every reply the better of the identity and where its node was last found."""
        identity = permutation.identity(self.spec)
        found: list[Permutation] = []
        for node, reply in zip(nodes, params, strict=True):
            known = self.memory.recall(node)
            found.append(identity if known is None else closest(self.spec, sent, reply, [identity, known]))
        return found

    def _still(self, nodes: Sequence[int], weights: Sequence[float], seen: Seen) -> _Found | None:
        """What a match would find where no reply has to move: the identity. None where that is not proven."""
        if any(self.memory.recall(node) is not None for node in nodes):
            return None
        objective = seen.agreement_of_still(weights, apart=self.mode == "separate")
        if objective is None:
            return None
        return _Found([permutation.identity(self.spec)] * len(nodes), (objective, objective), 0.0, 0.0, 0)

    def _jointly(
        self, nodes: Sequence[int], params: Sequence[Params], weights: Sequence[float], sent: Params
    ) -> _Found:
        """Match the replies with each other, then lay their universe onto the model that was sent out."""
        starts = self._located(nodes, params, sent)
        located = [_moved(self.spec, start, reply) for start, reply in zip(starts, params, strict=True)]
        pulls = bounded_weights(self.spec, located, weights)
        found = self._once_more(located, pulls, self._match(located, pulls))
        ends = found.objectives[0], found.objectives[-1]
        numbers = ends, found.gap, found.gain, found.steps, found.timed_out
        universe = [permutation.Moved(self.spec, *pair) for pair in zip(found.permutations, located, strict=True)]
        mean = weighted_mean(universe, pulls)
        onto = into_basis(
            self.spec, sent, mean, max_steps=self.max_steps, tolerance=self.tolerance, max_seconds=self._seconds
        )
        maps = [permutation.compose(onto, perm) for perm in found.permutations]
        return _Found([permutation.compose(perm, start) for perm, start in zip(maps, starts, strict=True)], *numbers)

    def _once_more(self, nodes: Sequence[Params], weights: Sequence[float], found: Match) -> Match:
        """The match from the second start, where there is one and the first match moved many units."""
        moved = max(permutation.share_moved(perm) for perm in found.permutations)
        if self.second_start is None or found.timed_out or moved <= MOVED or self._batch(nodes) < len(nodes):
            return found
        start = self.second_start(nodes, weights)
        if start is None:
            return found
        again = self._match(nodes, weights, start)
        return replace(again, objectives=(found.objectives[0], *again.objectives), steps=found.steps + again.steps)

    def _separately(
        self, nodes: Sequence[int], params: Sequence[Params], weights: Sequence[float], sent: Params
    ) -> _Found:
        """Match each reply with nothing but the model that was sent out."""
        starts = self._located(nodes, params, sent)
        found = [
            self._match([sent, _moved(self.spec, start, reply)], None)
            for reply, start in zip(params, starts, strict=True)
        ]
        before, after = (sum(each.objectives[end] for each in found) for end in (0, -1))
        moves = [permutation.compose(each.between(0, 1), start) for each, start in zip(found, starts, strict=True)]
        gap, gain = max(each.gap for each in found), max(each.gain for each in found)
        late = any(each.timed_out for each in found)
        return _Found(moves, (before, after), gap, gain, sum(each.steps for each in found), late)

    def _match(self, nodes: Sequence[Params], weights: Sequence[float] | None, start: Start = "auto") -> Match:
        batch = self._batch(nodes)
        if weights is not None and batch < len(nodes):
            steps, tolerance, seconds = self.max_steps, self.tolerance, self._seconds
            return match_bounded(
                self.spec, nodes, weights, batch, max_steps=steps, tolerance=tolerance, max_seconds=seconds
            )
        return match(
            self.spec,
            nodes,
            weights=weights,
            start=start,
            max_steps=self.max_steps,
            tolerance=self.tolerance,
            callback=MatchLog(self.tolerance),
            max_seconds=self._seconds,
        )

    @property
    def _seconds(self) -> float | None:
        """What is left of the time for this round's search."""
        return None if self.max_seconds is None else max(self._deadline - time.monotonic(), 0.0)

    def _batch(self, nodes: Sequence[Params]) -> int:
        """How many nodes may be matched at once."""
        if self.memory_limit is None:
            return len(nodes)
        size = sum(nodes[0][name].nbytes for name in self.spec.tensors)
        return max(2, int(self.memory_limit // (_MODELS * size)))

    def _rebased(
        self, nodes: Sequence[int], weights: Sequence[float], moves: Sequence[Permutation]
    ) -> tuple[list[Permutation], Permutation]:
        """The maps of the nodes, and that of the sent model, into the basis of one of the nodes if asked for."""
        unmoved = list(moves), permutation.identity(self.spec)
        if self.basis in ("global", "client"):
            return unmoved
        if self.basis == "largest":
            chosen = max(range(len(nodes)), key=weights.__getitem__)
        elif self.basis in nodes:
            chosen = [node == self.basis for node in nodes].index(True)
        else:
            log(WARNING, "\t> node %s did not reply: this round ends in the basis of the last global model", self.basis)
            return unmoved
        return [permutation.between(moves[chosen], move) for move in moves], permutation.invert(moves[chosen])


def _moved(spec: PermutationSpec, perm: Permutation, params: Params) -> Params:
    """The params themselves where nothing moves."""
    return params if permutation.is_identity(perm) else permutation.apply(spec, perm, params)
