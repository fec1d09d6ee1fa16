"""The matching problem: nodes checked, put in canonical order, and compiled into the terms of the agreement."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.terms import Term, compile_terms, matched_names, working_dtype
from c2m3_fl.core.universe import Images, agreement, gradient, images_at_vertex, inner
from c2m3_fl.errors import ParamsError


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
    """

    spec: PermutationSpec
    terms: tuple[Term, ...]
    weights: Tensor
    constant: float
    scale: float
    like: Tensor

    @classmethod
    def of(cls, spec: PermutationSpec, nodes: Sequence[Params], weights: Tensor) -> Problem:
        """Compile; the nodes must have been checked."""
        terms = compile_terms(spec, nodes)
        fixed = [images_at_vertex(term, {}) for term in terms if not term.groups]
        moving = tuple(term for term in terms if term.groups)
        norms = [sum(inner(term.value[i], term.value[i]) for term in moving) ** 0.5 for i in range(len(nodes))]
        shares = [w * norm for w, norm in zip(weights.tolist(), norms, strict=True)]
        scale = 0.5 * (sum(shares) ** 2 - sum(share**2 for share in shares))
        names = matched_names(spec, nodes)
        device = nodes[0][names[0]].device if names else torch.device("cpu")
        like = torch.empty(0, dtype=working_dtype(nodes, names), device=device)
        return cls(spec, moving, weights, sum(agreement(image, weights) for image in fixed), max(scale, 0.0), like)

    @property
    def count(self) -> int:
        """Number of nodes."""
        return len(self.weights)

    def objective(self, images: Sequence[Images]) -> float:
        """The weighted agreement over all pairs of nodes."""
        return self.constant + sum(agreement(image, self.weights) for image in images)

    def gradient(self, images: Sequence[Images]) -> dict[str, Tensor]:
        """Per group, shape (nodes, size, size); every node's own weight, a common factor, is left out."""
        into = {
            name: self.like.new_zeros(self.count, group.size, group.size) for name, group in self.spec.groups.items()
        }
        for image in images:
            gradient(image, self.weights, into)
        return into


def check_nodes(spec: PermutationSpec, nodes: Sequence[Params]) -> None:
    """Raise `ParamsError` unless there are nodes, all of which fit the spec and are finite."""
    if len(nodes) < 1:
        raise ParamsError("nodes: got none, expected at least one state dict to match")
    for index, node in enumerate(nodes):
        spec.check(node, f"node {index}")
        for name in spec.tensors:
            value = node[name]
            if torch.is_floating_point(value) and not bool(torch.isfinite(value).all()):
                bad = int((~torch.isfinite(value)).sum())
                raise ParamsError(
                    f"node {index}: {name!r} has {bad} values that are NaN or infinite, expected finite ones; "
                    "leave this node out"
                )


def canonical_order(
    spec: PermutationSpec, nodes: Sequence[Params], weights: Tensor, start: Sequence[Permutation] | None = None
) -> tuple[int, ...]:
    """The nodes sorted by a digest of what they bring: the same whichever order they arrive in."""

    def key(index: int) -> tuple[str, float, str]:
        content, places = hashlib.sha256(), hashlib.sha256()
        for name in spec.tensors:
            _digest(content, nodes[index][name])
        if start is not None:
            for name in spec.groups:
                _digest(places, start[index][name])
        return content.hexdigest(), float(weights[index]), places.hexdigest()

    return tuple(sorted(range(len(nodes)), key=key))


def _digest(into: hashlib._Hash, value: Tensor) -> None:
    flat = value.detach().cpu().contiguous().reshape(-1)
    into.update(str(flat.dtype).encode())
    into.update(flat.view(torch.uint8).numpy().data)
