"""The matching problem: nodes checked, put in canonical order, and compiled into the terms of the agreement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import isfinite

import torch
from torch import Tensor

from c2m3_fl.core.mapped import agreement, dot, moved
from c2m3_fl.core.rotation import identity_matrix
from c2m3_fl.core.spec import Group, Params, PermutationSpec
from c2m3_fl.core.terms import Term, compile_terms, matched_names, working_dtype
from c2m3_fl.errors import ConfigError, ParamsError


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be matched. The nodes are kept once, in an order that changes in place while they are matched.

    Attributes
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    terms : tuple of Term
        The parts of the agreement that some group moves, every node's in its frame.
    frames : dict of str to Tensor of int64, shape (nodes, size), or of float64, shape (nodes, size, size)
        The permutations in whose order the terms hold the nodes, or the rotations: the identity at first.
    weights : Tensor of float64, shape (nodes,)
        Averaging weights, which sum to one.
    constant : float
        The part of the agreement that nothing moves.
    scale : float
        ``sum_{i<j} w_i w_j |W_i| |W_j|`` over the terms: the largest agreement that is conceivable.
    like : Tensor
        An empty tensor of the dtype and on the device of the computation.
    frozen : int
        How many nodes, the first ones, stay where they are because they are in the universe already.
    """

    spec: PermutationSpec
    terms: tuple[Term, ...]
    frames: dict[str, Tensor]
    weights: Tensor
    constant: float
    scale: float
    like: Tensor
    frozen: int = 0

    @classmethod
    def of(
        cls,
        spec: PermutationSpec,
        nodes: Sequence[Params],
        weights: Tensor,
        frozen: int = 0,
        *,
        balance: bool = False,
    ) -> Problem:
        """Compile the nodes into terms.

        Parameters
        ----------
        spec : PermutationSpec
            The symmetries of the network.
        nodes : sequence of mappings of str to Tensor
            State dicts that `check_nodes` has checked; not mutated.
        weights : Tensor of float64, shape (nodes,)
            Averaging weights, which sum to one.
        frozen : int
            How many nodes, the first ones, stay where they are.
        balance : bool
            See `match`.
        """
        terms = compile_terms(spec, nodes, _balancing(spec, nodes) if balance else None)
        constant = sum(_agreement(term, weights) for term in terms if not term.groups)
        moving = tuple(term for term in terms if term.groups)
        squares = sum((_squares(term).cpu() for term in moving), torch.zeros(len(nodes)))
        norms = squares.sqrt().tolist()
        shares = [w * norm for w, norm in zip(weights.tolist(), norms, strict=True)]
        scale = sum(share * before for share, before in zip(shares[1:], accumulate(shares), strict=False))
        names = matched_names(spec, nodes)
        device = nodes[0][names[0]].device if names else torch.device("cpu")
        like = torch.empty(0, dtype=working_dtype(nodes, names), device=device)
        frames = {
            name: identity_matrix(group.size).to(device).repeat(len(nodes), 1, 1)
            if group.orthogonal
            else torch.arange(group.size, device=device).repeat(len(nodes), 1)
            for name, group in spec.groups.items()
        }
        return cls(spec, moving, frames, weights, constant, max(scale, 0.0), like, frozen)

    @property
    def unit(self) -> float:
        """The unit of gaps and gains: `scale`, or a tiny number where that is zero, so that no gain is hidden."""
        return self.scale if self.scale > 0 else torch.finfo(torch.float64).tiny

    @property
    def count(self) -> int:
        """Number of nodes."""
        return len(self.weights)

    def frame(self, node: int) -> dict[str, Tensor]:
        """The permutations in whose order a node is kept."""
        return {name: rows[node] for name, rows in self.frames.items()}

    def touched(self, groups: Iterable[str]) -> list[int]:
        """The numbers of the terms that some of the groups move."""
        return sorted({number for group in groups for number in self._numbers[group]})

    def move(self, node: int, index: Mapping[str, Tensor], numbers: Iterable[int] | None = None) -> None:
        """Permute some groups of a node's frame, in place.

        Parameters
        ----------
        node : int
            The node.
        index : mapping of str to Tensor
            Where the units of the groups go.
        numbers : iterable of int, optional
            The terms that move along; by default all that the groups move.
        """
        for number in self.touched(index) if numbers is None else numbers:
            term = self.terms[number]
            term.value[node] = moved(term, term.value[node], index)
        for name, rows in index.items():
            before = self.frames[name][node]
            self.frames[name][node] = before[rows] if rows.ndim == 1 else rows @ before

    def objective(self) -> float:
        """The weighted agreement over all pairs of nodes in their frames."""
        return self.constant + sum(_agreement(term, self.weights) for term in self.terms)

    @cached_property
    def _numbers(self) -> dict[str, list[int]]:
        """Per group the numbers of the terms that it moves."""
        numbers: dict[str, list[int]] = {name: [] for name in self.spec.groups}
        for number, term in enumerate(self.terms):
            for group in dict.fromkeys(term.groups):
                numbers[group].append(number)
        return numbers

    def gain(self, objectives: Sequence[float]) -> float:
        """What the last step of a course gained, in the unit of gaps: not negative, and zero for a course of none."""
        return max(objectives[-1] - objectives[-2], 0.0) / self.unit if len(objectives) > 1 else 0.0


def work_of(groups: Mapping[str, Group], terms: Sequence[Term]) -> int:
    """Work of one node's gradient and of the assignment problems for it, for some groups.

    Counted, not timed, so that what depends on it can be reproduced: entries times units for every product of the
    gradient, units cubed, its bound, for every assignment problem.

    Parameters
    ----------
    groups : mapping of str to Group
        The groups that move.
    terms : sequence of Term
        The terms that they touch.
    """
    products = sum(
        term.value[0].numel() * groups[group].size for term in terms for group in term.groups if group in groups
    )
    return products + sum(group.size**3 for group in groups.values())


def check_nodes(spec: PermutationSpec, nodes: Sequence[Params]) -> None:
    """Raise `ParamsError` unless there are nodes, all of which fit the spec and are finite."""
    if len(nodes) < 1:
        raise ParamsError("nodes: got none, expected at least one state dict to match")
    for index, node in enumerate(nodes):
        spec.check(node, f"node {index}")
        for name in spec.tensors:
            value = node[name]
            if not torch.is_floating_point(value) or isfinite(float(value.sum())):
                continue  # a finite sum has finite terms; one that is not may still have overflowed
            if not bool(torch.isfinite(value).all()):
                bad = int((~torch.isfinite(value)).sum())
                raise ParamsError(
                    f"node {index}: {name!r} has {bad} values that are NaN or infinite, expected finite ones; "
                    "leave this node out"
                )


def check_search(
    max_steps: int, tolerance: float, together: int | None = None, max_seconds: float | None = None
) -> None:
    """Raise `ConfigError` for limits that make no sense."""
    if max_steps < 0 or not tolerance >= 0:
        raise ConfigError(f"max_steps is {max_steps}, tolerance is {tolerance}; both must not be negative")
    if together is not None and together < 1:
        raise ConfigError(f"together is {together}, expected how many nodes step at once, or None for all of them")
    if max_seconds is not None and not max_seconds >= 0:
        raise ConfigError(f"max_seconds is {max_seconds}, expected a number of seconds that is not negative, or None")


def _agreement(term: Term, weights: Tensor) -> float:
    """A term's part of the agreement of the nodes in their frames."""
    return float(agreement(term.value, weights.tolist(), torch.empty_like(term.value[0])))


def _squares(term: Term) -> Tensor:
    """Every node's squared norm; node by node, because products take memory of their own."""
    return torch.stack([dot(own, own) for own in term.value])


def _balancing(spec: PermutationSpec, nodes: Sequence[Params]) -> dict[str, float]:
    """For every matched tensor one over its mean squared norm, so that each weighs the same; 1 where it is zero."""
    squares = {
        name: sum(float(node[name].double().square().sum()) for node in nodes) for name in matched_names(spec, nodes)
    }
    return {name: len(nodes) / square if square > 0 else 1.0 for name, square in squares.items()}
