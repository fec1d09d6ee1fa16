"""Nodes that do not fit the others: robust scores, in which no minority of the nodes decides what is typical."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core.drift import Products
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.stacked import stacked

# Chosen on seeds 100-102 of the federations of `tests.flower.hostile`, which no table shows (independent and shared
# starts; equal shares, Dirichlet .5 and .1; no attack and fourteen): 3 of 1,944 honest nodes and 352 of 756 hostile
# ones are named.
_WIDE = 3.0  # spreads below the median at which a cosine is odd
_LEAST = 0.1  # and by which share of the median at least: nodes of small spread are not told apart by rounding
_LARGE = 3.0  # medians of the norm
_LARGE_TENSOR = 10.0  # medians of a tensor's norm
_SMALL_TENSOR = 0.01  # of the whole norm: below, a tensor's own median is no measure
_DIRECTIONS = 5  # nodes from which on directions are compared; of four, 2 % of honest ones would be named
_OTHERS = 100  # nodes that each one is compared with, evenly spaced where there are more
_TINY = 1e-300  # instead of zero, where a norm divides
_SPREAD = 1.4826  # median deviations to a standard deviation


@dataclass(frozen=True, eq=False)
class _Geometry:
    """Norms of all nodes and their cosines with some of them, over all tensors.

    Attributes
    ----------
    norms : Tensor of float64, shape (nodes,)
        Norms of whole nodes.
    tensors : mapping of str to Tensor of float64, shape (nodes,)
        Norms of their tensors.
    cosines : Tensor of float64, shape (nodes, others)
        NaN where a node would be compared with itself.
    start : Tensor of float64, shape (nodes,)
        Their cosines with the model that was sent out; −1 for differences from it.
    """

    norms: Tensor
    tensors: dict[str, Tensor]
    cosines: Tensor
    start: Tensor


def find_outliers(spec: PermutationSpec, aligned: Sequence[Params], sent: Params) -> dict[int, str]:
    """The nodes that do not fit the others, and why; empty among fewer than three, which have no majority.

    A node is odd when its median cosine with the others lies more than three spreads and a tenth below what is
    typical, or when it is too large. Both are taken of the weights and of the updates: of independent starts the
    weights tell strangers, of a shared start the updates do. The spread is the larger one of that of the nodes'
    medians and the typical one of a node's cosines, so that nodes which all differ are not held against each
    other. Weights between the sent model and the others' are those of a client that trained little, and a node that
    is the model as it was sent is that of an idle one: neither is odd.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    aligned : sequence of mappings of str to Tensor
        The nodes in one basis.
    sent : mapping of str to Tensor
        The model that was sent out, in the same basis.
    """
    if len(aligned) < 3:
        return {}
    names = [name for name, tensor in spec.tensors.items() if not tensor.buffer and sent[name].is_floating_point()]
    return _odd(*_compare(names, aligned, sent))


def outliers_of(products: Products) -> dict[int, str]:
    """The same from inner products: of at most `drift.MOST` nodes that none has to move.

    Parameters
    ----------
    products : Products
        Of the nodes, in one basis, and of their drifts from the model that was sent out.
    """
    if products.drifts.shape[1] < 3:
        return {}
    found = []
    start = products.start.sum().sqrt()
    for kind, each in enumerate((products.nodes, products.drifts)):
        squares = each.diagonal(dim1=1, dim2=2).clamp(min=0)
        norms = squares.sum(0).sqrt()
        scale = norms.clamp(min=_TINY)
        cosines = (each.sum(0) / scale[:, None] / scale).fill_diagonal_(torch.nan)
        towards = (products.along + products.start[:, None]).sum(0) / scale / start.clamp(min=_TINY)
        tensors = dict(zip(products.names, squares.sqrt(), strict=True))
        found.append(_Geometry(norms, tensors, cosines, towards if kind == 0 else -torch.ones_like(norms)))
    return _odd(*found)


def _odd(weights: _Geometry, updates: _Geometry) -> dict[int, str]:
    odd: dict[int, str] = {}
    if len(weights.norms) >= _DIRECTIONS:
        odd |= _elsewhere("weights", weights) | _elsewhere("update", updates)
    odd |= _large("norm", weights) | _large("update", updates, _spread_of(updates.norms.clamp(min=_TINY).log()))
    odd |= _large_tensors(weights)  # of several reasons the last one says most
    return {index: odd[index] for index in sorted(odd) if updates.norms[index] > 0}


def _compare(names: Sequence[str], aligned: Sequence[Params], sent: Params) -> tuple[_Geometry, _Geometry]:
    """The geometry of the nodes, and of their differences from the model that was sent out."""
    others = torch.linspace(0, len(aligned) - 1, min(len(aligned), _OTHERS)).round().long()
    squares = {name: torch.zeros(2, len(aligned), dtype=torch.float64) for name in names}
    products = torch.zeros(2, len(aligned), len(others), dtype=torch.float64)
    towards, length = torch.zeros(len(aligned), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for name, values, start in stacked(names, aligned, sent):
        towards += (values @ start).cpu()
        length += (start @ start).cpu()
        for kind, each in enumerate((values, values - start)):
            squares[name][kind] += each.square().sum(1).cpu()
            products[kind] += (each @ each[others].T).cpu()
    found = []
    for kind in range(2):
        tensors = {name: square[kind].sqrt() for name, square in squares.items()}
        norms = torch.stack([square[kind] for square in squares.values()]).sum(0).sqrt()
        scale = norms.clamp(min=_TINY)
        cosines = products[kind] / scale[:, None] / scale[others]
        cosines[others, torch.arange(len(others))] = torch.nan
        start_cosines = towards / scale / length.sqrt().clamp(min=_TINY)
        found.append(_Geometry(norms, tensors, cosines, start_cosines if kind == 0 else -torch.ones_like(norms)))
    return found[0], found[1]


def _elsewhere(what: str, found: _Geometry) -> dict[int, str]:
    """Nodes that point elsewhere than the others, and than the model that was sent out."""
    score = _median(found.cosines, 1)
    typical = _median(score)
    apart = _SPREAD * _median(_median((found.cosines - score[:, None]).abs(), 1))
    least = typical - max(_WIDE * _spread_of(score), _WIDE * float(apart), _LEAST * abs(float(typical)))
    return {
        index: f"{what}: cosine with the others {score[index]:.2f}, typically {typical:.2f}"
        for index, value in enumerate(torch.maximum(score, found.start).tolist())
        if value < least
    }


def _large(what: str, found: _Geometry, spread: float = 0.0) -> dict[int, str]:
    """Nodes of a norm of many medians, and of many spreads of the norms' logarithms."""
    factor = found.norms / _median(found.norms).clamp(min=_TINY)
    limit = max(_LARGE, float(torch.tensor(_WIDE * spread).exp()))
    return {
        index: f"{what}: {value:.3g} times as large as the others'"
        for index, value in enumerate(factor.tolist())
        if value > limit
    }


def _large_tensors(found: _Geometry) -> dict[int, str]:
    """Nodes one of whose tensors has a norm of many medians."""
    least = _SMALL_TENSOR * _median(found.norms).clamp(min=_TINY)
    odd = {}
    for name, norms in found.tensors.items():
        factor = norms / _median(norms).clamp(min=least)
        for index in (factor > _LARGE_TENSOR).nonzero().flatten().tolist():
            odd[index] = f"{name!r}: {factor[index]:.3g} times as large as the others'"
    return odd


def _median(values: Tensor, dim: int = 0) -> Tensor:
    """Median of what is not NaN; the mean of the two in the middle."""
    return torch.nanquantile(values, 0.5, dim=dim)


def _spread_of(values: Tensor) -> float:
    """Robust standard deviation, from the median deviation from the median."""
    return _SPREAD * float(_median((values - _median(values)).abs()))
