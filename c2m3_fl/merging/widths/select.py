"""Choose the units that a narrower network keeps: those whose loss a refit could repair least.

Without unit u, the operators that read it lose at least ``|w_u|² / (G⁻¹)_uu``, with w_u the weights of the unit, G the
second moments of all units about their means, and the weights of the others refitted (Hassibi and Stork 1993, "Optimal
brain surgeon"). Units are removed one by one, so that of two equal ones the second is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params, PermutationSpec, Segment
from c2m3_fl.merging.align.linear_maps import axis_roles
from c2m3_fl.merging.recalibrate.targets import Front
from c2m3_fl.merging.widths.agree import sizes
from c2m3_fl.merging.widths.networks import Network
from c2m3_fl.network.operators import OUTPUT_AXIS, Kind, Operator

_RIDGE = 1e-4  # of the mean variance of the units: as much is left of a unit that the others determine


@dataclass
class _Reader:
    """An operator that reads units: the inverse of their second moments, and their weights, one row per unit."""

    inverse: Tensor
    weight: Tensor

    def losses(self) -> Tensor:
        """For every unit what its removal costs."""
        return self.weight.square().sum(1) / self.inverse.diagonal().clamp_min(torch.finfo(torch.float64).tiny)

    def remove(self, unit: int) -> None:
        """Remove a unit and refit the weights of the others."""
        column = self.inverse[:, unit] / self.inverse[unit, unit]
        self.weight = self.weight - column[:, None] * self.weight[unit]
        self.inverse = self.inverse - column[:, None] * self.inverse[unit]


def chosen_units(wide: Network, spec: PermutationSpec, params: Params) -> dict[str, Tensor]:
    """For every group the units of a network that a narrower one keeps, in order.

    Parameters
    ----------
    wide : Network
        The network; without calibration data, second moments of its units count as equal.
    spec : PermutationSpec
        Symmetries of the narrower one.
    params : mapping of str to Tensor
        State dict of the network.
    """
    readers = _readers(wide, params)
    chosen: dict[str, Tensor] = {}
    groups = wide.spec.groups
    for name in wide.spec.roots:
        families = wide.spec.children(name)
        if families:  # a block costs what its units cost together
            costs = [_cost(readers[child]).reshape(groups[name].size, -1).sum(1) for child in families]
            kept = torch.stack(costs).sum(0).argsort(descending=True, stable=True)[: spec.groups[name].size]
            chosen[name] = kept.sort().values
        else:
            chosen[name] = _kept(readers[name], torch.arange(1), groups[name].size, spec.groups[name].size)
        for child in families:
            block = groups[child].size // groups[name].size
            chosen[child] = _kept(readers[child], chosen[name], block, sizes(spec)[child])
    return {name: chosen[name] for name in groups}


def _cost(readers: Sequence[_Reader]) -> Tensor:
    """What the removal of every unit costs, each reader relative to all that it reads."""
    losses = [reader.losses() for reader in readers]
    return torch.stack([each / each.sum().clamp_min(torch.finfo(each.dtype).tiny) for each in losses]).sum(0)


def _kept(readers: Sequence[_Reader], blocks: Tensor, block: int, room: int) -> Tensor:
    """Remove the cheapest unit until every kept block of `block` units has `room` left."""
    count = len(readers[0].weight)
    owner = torch.arange(count) // block
    left = torch.isin(owner, blocks)
    for unit in torch.nonzero(~left)[:, 0].tolist():
        for reader in readers:
            reader.remove(unit)
    for _ in range(len(blocks) * (block - room)):
        full = torch.bincount(owner[left], minlength=int(owner.max()) + 1) > room
        cost = torch.where(left & full[owner], _cost(readers), torch.inf)
        unit = int(cost.argmin())
        left[unit] = False
        for reader in readers:
            reader.remove(unit)
    return torch.nonzero(left)[:, 0]


def _readers(wide: Network, params: Params) -> dict[str, list[_Reader]]:
    """The readers of every group; for a group that no operator is known to read, all tensors that carry it."""
    spec, program = wide.spec, wide.programs[0]
    reads = {name: axis for name, roles in axis_roles(spec, program).items() for axis in roles if axis is not None}
    found: dict[str, list[_Reader]] = {name: [] for name in spec.groups}
    held = wide.held.to(next(iter(params.values())).device)
    front = Front(held.programs, held.batches, params)
    for place, operator in enumerate(program.operators):
        axis = reads.get(operator.weight, -1)
        if operator.kind not in OUTPUT_AXIS or operator.kind is Kind.TRANSPOSED or axis < 0:
            continue
        for segment in spec.tensors[operator.weight].axes[axis]:
            weight = _rows_of(operator, params[operator.weight], axis, segment)
            moments = _moments(front, place, segment) if held.batches else torch.eye(segment.size)
            found[segment.group].append(_Reader(_inverse(moments.double()), weight))
    for name, readers in found.items():
        if not readers:
            size = spec.groups[name].size
            readers.append(_Reader(torch.eye(size, dtype=torch.float64), _entries(spec, name, params)))
    return found


def _rows_of(operator: Operator, weight: Tensor, axis: int, segment: Segment) -> Tensor:
    """The weights that read each unit, shape (units, weights)."""
    wide = weight.double().cpu()
    if operator.groups > 1:  # block after block, as the virtual axis of the spec
        split = wide.reshape(operator.groups, wide.shape[0] // operator.groups, *wide.shape[1:])
        rows = split.transpose(1, 2).flatten(0, 1)
    else:
        rows = wide.movedim(axis, 0)
    return rows[torch.from_numpy(segment.positions)].flatten(1)


def _moments(front: Front, place: int, segment: Segment) -> Tensor:
    """Second moments of units about their means, over all positions and slots of an operator's input."""
    count = 0
    first = torch.zeros(segment.size, dtype=torch.float64)
    second = torch.zeros(segment.size, segment.size, dtype=torch.float64)
    for operator, walk in front.before(place):
        source: Tensor = walk.value(operator.input)
        axis = -1 - operator.layout.spatial
        rows = source.movedim(axis, -1).flatten(0, -2)[:, torch.from_numpy(segment.positions).to(source.device)]
        rows = rows.movedim(1, -1).flatten(0, 1).double().cpu()
        count, first, second = count + len(rows), rows.sum(0) + first, rows.T @ rows + second
    mean = first / count
    return second / count - mean[:, None] * mean


def _inverse(moments: Tensor) -> Tensor:
    scale = moments.diagonal().mean().clamp_min(torch.finfo(moments.dtype).tiny)
    lifted = moments + _RIDGE * scale * torch.eye(len(moments), dtype=moments.dtype)
    inverse: Tensor = torch.linalg.inv(lifted)
    return inverse


def _entries(spec: PermutationSpec, group: str, params: Params) -> Tensor:
    """All entries of the tensors that carry a group, one row per unit; zeros for one that none carries."""
    parts = [torch.zeros(spec.groups[group].size, 1, dtype=torch.float64)]
    for name, tensor in spec.tensors.items():
        for axis, segment in tensor.segments:
            if segment.group == group and tensor.diagonal == 1 and params[name].is_floating_point():
                value = params[name].double().cpu().movedim(axis, 0)
                parts.append(value[torch.from_numpy(segment.positions)].flatten(1))
    return torch.cat(parts, 1)
