"""The matching problem: nodes checked, put in canonical order, and compiled into the terms of the agreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite

import torch
from torch import Tensor

from c2m3_fl.core.mapped import Images, inners
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.terms import Term, compile_terms, matched_names, working_dtype
from c2m3_fl.errors import ConfigError, ParamsError


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be matched.

    Attributes
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    terms : tuple of Term
        The parts of the agreement that some group moves.
    weights : Tensor of float64, shape (nodes,)
        Averaging weights, which sum to one.
    constant : float
        The part of the agreement that nothing moves.
    scale : float
        ``sum_{i<j} w_i w_j |W_i| |W_j|`` over the terms: the largest agreement that is conceivable.
    like : Tensor
        An empty tensor of the dtype and on the device of the computation.
    frozen : int
        How many nodes, the first ones, stay where they are: they are in the universe already.
    """

    spec: PermutationSpec
    terms: tuple[Term, ...]
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
        """Compile; the nodes must have been checked. See `match` for `balance`."""
        terms = compile_terms(spec, nodes, _balancing(spec, nodes) if balance else None)
        constant = sum(float(Images(term).agreement(weights)[0]) for term in terms if not term.groups)
        moving = tuple(term for term in terms if term.groups)
        squares = sum((inners(term.value, term.value).cpu() for term in moving), torch.zeros(len(nodes)))
        norms = squares.sqrt().tolist()
        shares = [w * norm for w, norm in zip(weights.tolist(), norms, strict=True)]
        scale = sum(share * before for share, before in zip(shares[1:], accumulate(shares), strict=False))
        names = matched_names(spec, nodes)
        device = nodes[0][names[0]].device if names else torch.device("cpu")
        like = torch.empty(0, dtype=working_dtype(nodes, names), device=device)
        return cls(spec, moving, weights, constant, max(scale, 0.0), like, frozen)

    @property
    def unit(self) -> float:
        """What gaps and gains are measured in: `scale`, or where that is zero something that hides no gain."""
        return self.scale if self.scale > 0 else torch.finfo(torch.float64).tiny

    @property
    def count(self) -> int:
        """Number of nodes."""
        return len(self.weights)

    def objective(self, images: Sequence[Images]) -> float:
        """The weighted agreement over all pairs of nodes."""
        return self.constant + sum(float(image.agreement(self.weights)[0]) for image in images)


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


def check_search(max_steps: int, tolerance: float, together: int | None = None) -> None:
    """Raise `ConfigError` for limits that no search can keep."""
    if max_steps < 0 or not tolerance >= 0:
        raise ConfigError(f"max_steps is {max_steps}, tolerance is {tolerance}; both must not be negative")
    if together is not None and together < 1:
        raise ConfigError(f"together is {together}, expected how many nodes step at once, or None for all of them")


def _balancing(spec: PermutationSpec, nodes: Sequence[Params]) -> dict[str, float]:
    """For every matched tensor one over its mean squared norm, so that each weighs the same; 1 where it is zero."""
    squares = {
        name: sum(float(node[name].double().square().sum()) for node in nodes) for name in matched_names(spec, nodes)
    }
    return {name: len(nodes) / square if square > 0 else 1.0 for name, square in squares.items()}
