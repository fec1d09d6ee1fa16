"""A cheap proof that nodes which share a basis are matched already, without a gradient or an assignment problem.

Let B be the weighted mean of the nodes and node i be B + D. For one group, with rows a, b of everything it carries,
distances d_ab = |B_a - B_b|, drifts e_a = |D_a| and q_a = <B_a, D_a>, the gradient of node i at the identity obeys

    C_aa + C_bb - 2 C_ab >= (1 - w) d_ab^2 + (q_a - q_b) - 2 d_ab ((1 - w) e_b + w e_a) - w (e_a + e_b)^2,

because the other nodes' sum is (1 - w) B - w D. The antisymmetric q_a - q_b is absorbed by the dual potentials of the
assignment problem. If the rest is not negative for any a, b, the identity answers the oracle. That takes one Gram
matrix of the mean per group, where the gradient takes one product per node, and the norms of the drifts. What remains
grows with d once it is positive and falls with e, so distances over some of the coordinates are enough for a proof, and
so are each unit's largest drift and weight over the nodes. All coordinates are used only where a sample of them
suggests that the bound holds.

Nodes that drifted from one network S are proven without a Gram matrix of their own. Let M be the mean drift, so that
B = S + M. Distances D_ab = |S_a - S_b| are known when S is sent, and d_ab >= D_ab - |M_a| - |M_b|. With that in place
of d the bound is smaller than it was, so where it holds, `prove_identity` with all coordinates finds the same
(`still_around`).

Where drifts are small, they need not even be compared with their mean (`reach`). Let s_a be the distance from unit a
of S to the nearest other unit of its group, and let no node's unit a be farther than k s_a from S_a. Then M_a is not
longer either, so d >= D - k (s_a + s_b) >= (1 - 2 k) D, for D is at least s_a and s_b; and node i lies 1 - w times its
distance from the mean of the others away from the mean of all, so e_a <= 2 (1 - w) k D, and e_b too. Without q_a - q_b
and divided by 1 - w, the right-hand side of the bound is at least

    d^2 - 4 k D d - 16 w (1 - w) k^2 D^2 >= ((1 - 2 k)^2 - 4 k (1 - 2 k) - 4 k^2) D^2 = (1 - 8 k + 8 k^2) D^2,

because the left-hand side grows with d from 2 k D on, and w (1 - w) <= 1/4. It is positive for k < (2 - sqrt 2) / 4 =
.146, whatever the weights and however many nodes there are; S itself may be one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from c2m3_fl.core.mapped import contract, inners
from c2m3_fl.core.spec import Axis, Params, PermutationSpec, Segment
from c2m3_fl.core.terms import Term, compile_terms, densify, matched_names, working_dtype

_AT_A_TIME = 1 << 18  # elements per chunk, so that temporaries stay in cache
_LENGTHS = (256, 1024)  # coordinates of every term that the first attempts look at
_SLACK = 2.0  # give up early unless the sampled squared distances, times this, satisfy the bound
_ROUNDING = 16  # units of rounding, relative to the squared norms, that are taken off every squared distance
_REACH = 1 / 7  # of the distance to the nearest unit: how far a unit may drift, below (2 - sqrt 2) / 4
_AHEAD = 4  # times `_ROUNDING`: what is taken off in the mean of the nodes must be taken off here, too
_SAFETY = 1e-4  # of drifts, added to them: sums of few nodes in single precision are far more exact


def prove_identity(spec: PermutationSpec, nodes: Sequence[Params], weights: Tensor) -> float | None:
    """The agreement at the identity where the bound proves the identity stationary; None where it does not.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    nodes : sequence of mappings of str to Tensor
        State dicts that fit the spec.
    weights : Tensor of float64, shape (nodes,)
        Averaging weights, which sum to one; all positive.
    """
    names = matched_names(spec, nodes)
    if not names:
        return 0.0
    dtype, device = working_dtype(nodes, names), nodes[0][names[0]].device
    shares = weights.to(device=device, dtype=dtype)
    drifts = {
        name: torch.zeros(len(nodes), group.size, dtype=dtype, device=device) for name, group in spec.groups.items()
    }
    mean, agreement, scratch = {}, 0.0, torch.empty(0, dtype=dtype, device=device)
    for name in names:
        values = [node[name].detach().to(device=device, dtype=dtype).contiguous() for node in nodes]
        parts = _portions(values)
        scratch = scratch if len(scratch) >= parts[0][1].numel() else scratch.new_empty(parts[0][1].numel())
        centre = values[0].clone()  # of identical nodes it will be the very node
        for rows, part in parts:
            apart = torch.sub(part, values[0], out=scratch[: part.numel()].view(part.shape))
            centre.view(-1).addmv_(apart.view(len(part), -1).T, shares[rows])
        squares = torch.cat([inners(part, part) for _, part in parts])
        tiny = squares < values[0].numel() * torch.finfo(dtype).tiny ** 0.8
        if any(bool(value.any()) for value, flag in zip(values, tiny.tolist(), strict=True) if flag):
            return None  # squares may underflow
        agreement += 0.5 * (float(inners(centre[None], centre[None])) - float(squares @ shares.double().square()))
        mean[name] = centre
        for rows, part in parts:
            drift = torch.sub(part, centre, out=scratch[: part.numel()].view(part.shape))
            _add_squares(spec, name, drift, rows, drifts)
    terms = compile_terms(spec, [{**nodes[0], **mean}])
    if any(bool(drifts[name].any()) for name in spec.rotations):
        return None  # the bound is one of permutations
    proven = all(_proven(terms, name, drifts[name].sqrt(), shares) for name in spec.groups)
    return agreement if proven else None


def distances(spec: PermutationSpec, params: Params) -> Iterator[tuple[str, Tensor]]:
    """Per group the distances between its units, shape (size, size), less what rounding may have added.

    Zero where squares may have underflowed or overflowed, infinite on the diagonal.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network, without rotations.
    params : mapping of str to Tensor
        The network.
    """
    terms = compile_terms(spec, [params])
    like = terms[0].value if terms else torch.empty(0)
    for name, group in spec.groups.items():
        gram, _ = _gram(terms, name, like.new_empty(1, group.size), None)
        squares, limits = gram.diagonal(), torch.finfo(gram.dtype)
        sums = squares[:, None] + squares[None, :]
        apart = torch.sub(sums.mul_(1 - _AHEAD * _ROUNDING * limits.eps), gram, alpha=2)
        apart = torch.where((apart > limits.tiny**0.8) & apart.isfinite(), apart, 0)
        yield name, apart.sqrt_().fill_diagonal_(torch.inf)


def reach(apart: Tensor) -> Tensor:
    """How far each unit may drift before its nodes need a closer look, shape (size,), from `distances`."""
    return _REACH * apart.amin(1)


def still_around(apart: Tensor, moved: Tensor, drifts: Tensor, shares: Tensor) -> bool:
    """Whether the bound holds for one group of nodes that drifted from one network.

    Parameters
    ----------
    apart : Tensor, shape (size, size)
        Distances between the units of that network, see `distances`.
    moved : Tensor, shape (size,)
        How far the mean of the nodes moved each unit from there.
    drifts : Tensor, shape (nodes, size)
        How far each node's units are from the mean's.
    shares : Tensor, shape (nodes,)
        Averaging weights, which sum to one; all positive.
    """
    least = torch.finfo(apart.dtype).tiny ** 0.4  # what underflows counts as this, so units that coincide fail
    drifts = (drifts + _SAFETY * (drifts + moved)).clamp(min=least)
    moved = moved + _SAFETY * (drifts.amax(0) + moved)
    square = (apart - moved[:, None] - moved[None, :]).clamp_(min=0).square_().fill_diagonal_(0)
    ends = torch.stack([shares.amin(), shares.amax()]).to(apart)
    if _holds(square, drifts.amax(0), ends):
        return True
    pairs = zip(drifts, shares.to(apart), strict=True)
    return len(drifts) > 1 and all(_holds(square, drift, share.expand(2)) for drift, share in pairs)


def _proven(terms: Sequence[Term], group: str, drifts: Tensor, shares: Tensor) -> bool:
    """Whether the bound holds for one group: for all nodes at once on some coordinates, or node by node on all."""
    if not bool(drifts.any()):
        return True  # identical nodes
    largest, ends = drifts.amax(0), torch.stack([shares.amin(), shares.amax()])
    for length in _LENGTHS:
        some, scaled = _gram(terms, group, drifts, length)
        if _bound_holds(some, largest, ends):
            return True
        if not _bound_holds(_SLACK * scaled, largest, ends):
            return False  # all coordinates are unlikely to satisfy it either
    whole, _ = _gram(terms, group, drifts, None)
    return all(_bound_holds(whole, drift, share.expand(2)) for drift, share in zip(drifts, shares, strict=True))


def _gram(terms: Sequence[Term], group: str, like: Tensor, length: int | None) -> tuple[Tensor, Tensor]:
    """Inner products of the units over about `length` coordinates of every term, and scaled up to all of them."""
    size = like.shape[1]
    gram, scaled = like.new_zeros(size, size), like.new_zeros(size, size)
    for term in terms:
        for axis, name in enumerate(term.groups):
            if name != group:
                continue
            part, whole = term.value, term.value[0].numel()
            for dim in (other for other in range(part.ndim - 1, 0, -1) if other != term.dim(axis)):
                if length is not None and part[0].numel() > length * size:
                    apart = -(-part[0].numel() // (length * size))  # spread out: neighbours may all be zero for a unit
                    places = torch.arange(0, part.shape[dim], min(part.shape[dim], apart), device=part.device)
                    part = part.index_select(dim, places)
            own = like.new_zeros(size, size)
            contract(part[0], part[0], term.dim(axis) - 1, own)
            gram += own
            scaled.add_(own, alpha=whole / part[0].numel())
    return gram, scaled


def _portions(values: list[Tensor]) -> list[tuple[slice, Tensor]]:
    """Which nodes, and their values stacked: small tensors many at a time, large ones one by one."""
    at_once = max(1, _AT_A_TIME // values[0].numel())
    slices = [slice(first, first + at_once) for first in range(0, len(values), at_once)]
    return [(rows, torch.stack(values[rows]) if at_once > 1 else values[rows][0][None]) for rows in slices]


@dataclass(frozen=True, eq=False)
class Placed:
    """A segment of an axis of a tensor, and where it is there; `positions` is None where it is the whole axis."""

    axis: int
    segment: Segment
    positions: Tensor | None

    @classmethod
    def all(cls, axes: Sequence[Axis], shape: Sequence[int], device: torch.device) -> tuple[Placed, ...]:
        """The segments of all axes of a tensor of this shape."""
        found = []
        for axis, segments in enumerate(axes):
            for segment in segments:
                flat = segment.positions.ravel()
                whole = np.array_equal(flat, np.arange(shape[axis]))
                found.append(cls(axis, segment, None if whole else torch.from_numpy(flat).to(device)))
        return tuple(found)


def add_squares(placed: Sequence[Placed], squares: Tensor, rows: slice, into: Mapping[str, Tensor]) -> None:
    """Add up the squares of every unit's part of a tensor, stacked for the nodes in `rows`.

    Parameters
    ----------
    placed : sequence of Placed
        The segments of the tensor.
    squares : Tensor, shape (nodes, ...)
        Of its elements.
    rows : slice
        Which nodes these are.
    into : mapping of str to Tensor, shape (nodes, size)
        Sums per group; these are mutated.
    """
    count, shape = len(squares), squares.shape[1:]
    sums: dict[int, Tensor] = {}
    for each in placed:
        axis, segment = each.axis, each.segment
        if axis not in sums:
            before, after = shape[:axis].numel(), shape[axis + 1 :].numel()
            along = squares.reshape(count, before, -1)
            along = along[:, 0] if before == 1 else (squares.new_ones(before) @ along)
            sums[axis] = along.view(count, shape[axis], after).sum(2)
        along = sums[axis] if each.positions is None else sums[axis].index_select(1, each.positions)
        units = along.view(count, segment.size, -1)
        into[segment.group][rows].add_(units.sum(2))
        if segment.slots:
            blocks = into[segment.slots].shape[1] // segment.inner
            slots = units.view(count, blocks, -1, segment.inner).sum(2)
            into[segment.slots][rows].add_(slots.flatten(1))


def _add_squares(spec: PermutationSpec, name: str, drift: Tensor, rows: slice, into: Mapping[str, Tensor]) -> None:
    """Add the squared norms of every unit's part of a tensor, stacked for the nodes in `rows`."""
    axes, squares = densify(spec.tensors[name], drift.square_())
    add_squares(Placed.all(axes, squares.shape[1:], squares.device), squares, rows, into)


def _bound_holds(gram: Tensor, drift: Tensor, ends: Tensor) -> bool:
    """Whether the bound holds for drifts up to `drift`, shape (size,), and weights between the two `ends`."""
    squares = gram.diagonal()
    sums = squares[:, None] + squares[None, :]
    return _holds((sums - 2 * gram - _ROUNDING * torch.finfo(gram.dtype).eps * sums).clamp_(min=0), drift, ends)


def _holds(square: Tensor, drift: Tensor, ends: Tensor) -> bool:
    """The same, from squared distances."""
    low, high = ends
    first = 2 * square.sqrt() * ((1 - low) * drift[None, :] + high * drift[:, None])
    second = high * (drift[:, None] + drift[None, :]).square()
    return bool(((1 - high) * square >= (first + second).fill_diagonal_(0)).all())
