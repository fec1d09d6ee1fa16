"""Into the basis of a given network: where a merge is mapped back to, and how well the nodes agree.

Permuting the universe, and every node with it, changes neither the agreement nor the merge. Once the nodes are matched
with each other, the universe may therefore be mapped onto any reference, such as the model that a server sent out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.drift import Products
from c2m3_fl.core.mapped import inner, inners
from c2m3_fl.core.match import match
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.spec import Params, PermutationSpec

_ROW = 1024  # elements, as in `mapped.inners`: sums over whole rows do not depend on the stretches
_AT_A_TIME = 1 << 18  # elements of all nodes


def into_basis(
    spec: PermutationSpec,
    reference: Params,
    params: Params,
    *,
    max_steps: int = 100,
    tolerance: float = 1e-4,
    max_seconds: float | None = None,
) -> dict[str, Tensor]:
    """Map of one network into the basis of another, which stays where it is.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries that both share.
    reference, params : mapping of str to Tensor
        The network that stays, and the one that is brought to it.
    max_steps, tolerance, max_seconds : int, float, float
        See `match`.
    """
    found = match(spec, [reference, params], max_steps=max_steps, tolerance=tolerance, max_seconds=max_seconds)
    return found.between(0, 1)


def closest(spec: PermutationSpec, reference: Params, params: Params, candidates: Sequence[Permutation]) -> Permutation:
    """The candidate that brings `params` closest to `reference`; the first of several equally close ones.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries that both share.
    reference, params : mapping of str to Tensor
        The network that stays, and the one that is brought to it.
    candidates : sequence of Permutation
        Maps of `params`, at least one.
    """
    scores = [_similarity(spec, reference, permutation.apply(spec, perm, params)) for perm in candidates]
    return candidates[scores.index(max(scores))]


def bounded_weights(
    spec: PermutationSpec, nodes: Sequence[Params], weights: Sequence[float], limit: float = 2.0
) -> list[float]:
    """Weights that bound every node's influence on the universe: its weight times its norm, at most `limit` medians.

    The agreement is linear in every node, so without a bound a node scaled by a thousand would decide all other
    permutations. Among nodes of similar norm nothing changes.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    nodes : sequence of mappings of str to Tensor
        State dicts.
    weights : sequence of float
        Averaging weights, on any scale.
    limit : float
        Largest norm, in median norms, that counts in full.
    """
    return bounded([_norm(spec, node) for node in nodes], weights, limit)


def bounded(norms: Sequence[float], weights: Sequence[float], limit: float = 2.0) -> list[float]:
    """The same for nodes of these norms."""
    ceiling = limit * float(torch.tensor(norms, dtype=torch.float64).median())
    return [weight if norm <= ceiling else weight * ceiling / norm for weight, norm in zip(weights, norms, strict=True)]


@dataclass(frozen=True)
class Consensus:
    """How well every node of a merge agrees with the others.

    Attributes
    ----------
    cosines : Tensor of float64, shape (nodes,)
        Cosine between a node and the weighted sum of the other nodes, over all matched tensors.
    norms : Tensor of float64, shape (nodes,)
        Norm of a node.
    layers : mapping of str to Tensor of float64, shape (nodes,)
        The cosine of every tensor by itself.
    """

    cosines: Tensor
    norms: Tensor
    layers: dict[str, Tensor]


def consensus(spec: PermutationSpec, aligned: Sequence[Params], weights: Sequence[float]) -> Consensus:
    """Compare each aligned node with the weighted sum of the others, in O(nodes).

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries that they share.
    aligned : sequence of mappings of str to Tensor
        State dicts in one basis.
    weights : sequence of float
        Averaging weights, on any scale.
    """
    share = torch.tensor(list(weights), dtype=torch.float64)
    share = share / share.sum()
    totals = torch.zeros(3, len(aligned), dtype=torch.float64)
    layers = {}
    for name in _matched(spec, aligned[0]):
        parts = torch.zeros_like(totals)
        for values in _stretches([_wide(node[name]).flatten() for node in aligned]):
            own = share.to(values)[:, None] * values
            others = own.sum(0) - own
            parts += torch.stack([inners(values, others), inners(values, values), inners(others, others)]).cpu()
        layers[name] = _cosine(parts)
        totals += parts
    return Consensus(_cosine(totals), totals[1].sqrt(), layers)


def _stretches(values: Sequence[Tensor]) -> Iterator[Tensor]:
    """Vectors of one length side by side, a stretch at a time: of many nodes all at once would take much memory."""
    length = max(1, _AT_A_TIME // (_ROW * len(values))) * _ROW
    for low in range(0, max(len(values[0]), 1), length):
        yield torch.stack([value[low : low + length] for value in values])


def consensus_of(products: Products, weights: Sequence[float]) -> Consensus:
    """The same from inner products, in O(nodes^2) whatever the size of the nodes.

    Parameters
    ----------
    products : Products
        Of the nodes, in one basis.
    weights : sequence of float
        Averaging weights, on any scale.
    """
    share = torch.tensor(list(weights), dtype=torch.float64)
    share = share / share.sum()
    found = products.nodes
    squares = found.diagonal(dim1=1, dim2=2)
    towards = found @ share - share * squares
    others = (found @ share @ share)[:, None] - 2 * share * towards - share**2 * squares
    parts = torch.stack([towards, squares, others.clamp(min=0)])
    totals = parts.sum(1)
    layers = {name: _cosine(parts[:, place]) for place, name in enumerate(products.names)}
    return Consensus(_cosine(totals), totals[1].sqrt(), layers)


def _cosine(parts: Tensor) -> Tensor:
    """From products and squared norms, shape (3, nodes); zero where a norm is."""
    scale = (parts[1] * parts[2]).sqrt()
    return torch.where(scale > 0, parts[0] / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0.0)


def _matched(spec: PermutationSpec, params: Params) -> list[str]:
    return [name for name, tensor in spec.tensors.items() if not tensor.buffer and params[name].is_floating_point()]


def _wide(value: Tensor) -> Tensor:
    """Half precision does not hold its own squares."""
    return value.detach() if value.dtype == torch.float64 else value.detach().float()


def _similarity(spec: PermutationSpec, left: Params, right: Params) -> float:
    return sum(inner(_wide(left[name]), _wide(right[name])) for name in _matched(spec, left))


def _norm(spec: PermutationSpec, params: Params) -> float:
    return math.sqrt(_similarity(spec, params, params))
