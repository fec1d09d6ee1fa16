"""Injections: the units of a network placed among those of a wider one, and tensors carried along.

A permutation lists, for every place of the universe, the unit that sits there. An injection does the same for a
network that has fewer units than there are places: ``units[place]`` is -1 where it has none. Equivalently, it is a
permutation of the network padded with dead units, all of whose weights are zero. Dead units contribute nothing to
the agreement, its gradient or its course along a step, so the matcher may be given padded networks as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.spec import Axis, Params, PermutationSpec, TensorSpec, refuse_rotations
from c2m3_fl.errors import SpecError
from c2m3_fl.merging.widths.agree import fits_into, sizes

Injection = Mapping[str, Tensor]


def seats(spec: PermutationSpec, wide: PermutationSpec) -> dict[str, Tensor]:
    """Place of every unit of a network padded to the sizes of a wider one, shape (units,) per group.

    Units keep their numbers; units of a nested group keep their numbers within their block.

    Raises
    ------
    SpecError
        When some group of `wide` has too few units.
    """
    refuse_rotations(wide, "networks of several widths")
    room, wanted = sizes(wide), sizes(spec)
    if not fits_into(spec, wide):
        short = next(name for name in wanted if wanted[name] > room[name])
        raise SpecError(f"group {short!r} has {wanted[short]} units, expected at most {room[short]}")
    found = {}
    for name, group in spec.groups.items():
        own = torch.arange(group.size)
        if group.parent is not None:
            own = own // wanted[name] * room[name] + own % wanted[name]  # a block has the number of its parent's unit
        found[name] = own
    return found


def injection(spec: PermutationSpec, wide: PermutationSpec, perm: Permutation) -> dict[str, Tensor]:
    """The injection that a permutation of the padded network is.

    Parameters
    ----------
    spec, wide : PermutationSpec
        Symmetries of the network and of the wider one.
    perm : mapping of str to Tensor
        Permutation of the padded network.

    Returns
    -------
    dict of str to Tensor
        For every group and place of `wide` the unit that sits there, or -1.
    """
    return {name: _inverse(places, wide.groups[name].size)[perm[name]] for name, places in seats(spec, wide).items()}


def between(to: Injection, source: Injection, to_sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """The map from one network to another through the universe: for every unit of `to` that of `source`, or -1.

    Parameters
    ----------
    to, source : mapping of str to Tensor
        Injections of both networks into one universe.
    to_sizes : mapping of str to int
        Number of units of `to`, per group.
    """
    found = {}
    for name, units in to.items():
        places = units.new_full((to_sizes[name],), -1)
        places[units[units >= 0]] = torch.nonzero(units >= 0)[:, 0]
        found[name] = torch.where(places >= 0, source[name][places], -1)
    return found


def without_dead_units(spec: PermutationSpec, params: Params, units: Injection) -> dict[str, Tensor]:
    """The injection without the units whose parameters are all zero: those of a network padded by its owner.

    Parameters
    ----------
    spec : PermutationSpec
        The network's symmetries.
    params : mapping of str to Tensor
        Its state dict.
    units : mapping of str to Tensor
        Its injection.
    """
    alive = {name: torch.zeros(group.size, dtype=torch.bool) for name, group in spec.groups.items()}
    seen = set()
    for name, tensor in spec.tensors.items():
        if tensor.buffer or not params[name].is_floating_point():
            continue
        for axis, segment in tensor.segments:
            if tensor.diagonal > 1 and axis == 1:
                continue  # its columns are virtual
            others = [dim for dim in range(len(tensor.shape)) if dim != axis]
            value = params[name].detach().cpu() != 0
            used = value.any(dim=others) if others else value
            alive[segment.group] |= used[torch.from_numpy(segment.positions)].any(1)
            seen.add(segment.group)
    return {
        name: torch.where(alive[name][index.clamp_min(0)], index, -1) if name in seen else index
        for name, index in units.items()
    }


def axis_sources(name: str, axis: int, source: PermutationSpec, target: PermutationSpec, units: Injection) -> Tensor:
    """For every coordinate of an axis of the target the coordinate of the source that it is made of, or -1.

    Parameters
    ----------
    name : str
        Name of the tensor.
    axis : int
        The axis; axis 1 of a block-diagonal tensor is the virtual one.
    source, target : PermutationSpec
        Two networks that differ in width alone.
    units : mapping of str to Tensor
        For every group and unit of the target the unit of the source, or -1.
    """
    one, two = source.tensors[name], target.tensors[name]
    found = torch.full((two.length(axis),), -1)
    for given, wanted in zip(one.axes[axis], two.axes[axis], strict=True):
        own = units[wanted.group]
        chosen = torch.from_numpy(given.positions)[own.clamp_min(0)]
        kept = (own >= 0)[:, None].expand(wanted.size, wanted.inner)
        if wanted.slots:
            slot = units[wanted.slots].reshape(-1, wanted.inner)
            slot = slot.repeat_interleave(wanted.size // len(slot), dim=0)
            kept = kept & (slot >= 0)
            chosen = chosen.gather(1, slot.clamp_min(0) % given.inner)
        found[torch.from_numpy(wanted.positions)] = torch.where(kept, chosen, -1)
    found[_rest(two.axes[axis], two.length(axis))] = _rest(one.axes[axis], one.length(axis))
    return found


def carry(source: PermutationSpec, target: PermutationSpec, units: Injection, params: Params) -> dict[str, Tensor]:
    """The state dict of a network of the target's widths, made of the units of one of the source's.

    Parameters
    ----------
    source, target : PermutationSpec
        Two networks that differ in width alone.
    units : mapping of str to Tensor
        For every group and unit of the target the unit of the source, or -1 for none: its entries are zero.
    params : mapping of str to Tensor
        State dict of the source; not mutated.
    """
    return Carrier(source, target, units)(params)


class Carrier:
    """Carries state dicts of one network by one injection: see `carry`. What it looks up serves all of them.

    Parameters
    ----------
    source, target, units
        As for `carry`.
    """

    def __init__(self, source: PermutationSpec, target: PermutationSpec, units: Injection) -> None:
        self._source, self._target, self._units = source, target, units
        self._found: dict[str, list[Tensor]] = {}

    def __call__(self, params: Params) -> dict[str, Tensor]:
        """The state dict of the target's widths; `params` are not mutated."""
        return {name: self._carried(name, value) for name, value in params.items()}

    def _carried(self, name: str, value: Tensor) -> Tensor:
        tensor = self._target.tensors[name]
        for axis, index in enumerate(self._sources(name)):
            if tensor.diagonal > 1 and axis == 1:
                value = _take_diagonal(name, self._source, self._target, self._sources(name)[0], value, index)
            else:
                value = take(value, axis, index)
        return value

    def _sources(self, name: str) -> list[Tensor]:
        if name not in self._found:
            axes = range(len(self._target.tensors[name].shape))
            found = [axis_sources(name, axis, self._source, self._target, self._units) for axis in axes]
            self._found[name] = found
        return self._found[name]


def owned_entries(
    name: str, source: PermutationSpec, target: PermutationSpec, units: Injection, ignore: int | None = None
) -> Tensor:
    """Which entries of a tensor of the target the source has, as booleans that broadcast to the target's shape.

    Parameters
    ----------
    name : str
        Name of the tensor.
    source, target, units
        As for `carry`.
    ignore : int, optional
        An axis that is not looked at.
    """
    tensor = target.tensors[name]
    masks = []
    for axis in range(len(tensor.shape)):
        if axis == ignore:
            continue
        has = axis_sources(name, axis, source, target, units) >= 0
        if tensor.diagonal > 1 and axis == 1:
            has = has.reshape(tensor.diagonal, -1)[_row_blocks(tensor)]
            masks.append(has.reshape(*has.shape, *(1,) * (len(tensor.shape) - 2)))
        else:
            masks.append(has.reshape(-1, *(1,) * (len(tensor.shape) - 1 - axis)))
    return reduce(torch.logical_and, masks, torch.ones((), dtype=torch.bool))


def take(value: Tensor, axis: int, index: Tensor) -> Tensor:
    """The coordinates of an axis by index, zeros where the index is -1."""
    index = index.to(value.device)
    found = value.index_select(axis, index.clamp_min(0))
    absent = torch.nonzero(index < 0)[:, 0]
    return found.index_fill(axis, absent, 0) if len(absent) else found


def _take_diagonal(
    name: str, source: PermutationSpec, target: PermutationSpec, rows: Tensor, value: Tensor, columns: Tensor
) -> Tensor:
    """The columns of a block-diagonal tensor whose rows have been taken: every block of rows has its own."""
    one, two = source.tensors[name], target.tensors[name]
    index = columns.reshape(two.diagonal, -1)[_row_blocks(two)]
    absent = (index < 0) | (rows < 0)[:, None]
    block = _row_blocks(one)[rows.clamp_min(0)][:, None]
    if not bool(((index // one.shape[1] == block) | absent).all()):
        raise SpecError(f"{name!r}: rows and columns of a block-diagonal tensor come from different blocks")
    index = torch.where(absent, 0, index % one.shape[1]).reshape(*absent.shape, *(1,) * (value.ndim - 2))
    found = value.gather(1, index.to(value.device).expand(*absent.shape, *value.shape[2:]))
    return found.masked_fill(absent.reshape(index.shape).to(value.device), 0)


def _row_blocks(tensor: TensorSpec) -> Tensor:
    """The diagonal block of every row."""
    return torch.arange(tensor.shape[0]) // (tensor.shape[0] // tensor.diagonal)


def _inverse(places: Tensor, count: int) -> Tensor:
    found = torch.full((count,), -1)
    found[places] = torch.arange(len(places))
    return found


def _rest(axis: Axis, length: int) -> Tensor:
    """The coordinates of an axis that belong to no unit, in order."""
    kept = torch.ones(length, dtype=torch.bool)
    for segment in axis:
        kept[torch.from_numpy(segment.positions)] = False
    return torch.nonzero(kept)[:, 0]
