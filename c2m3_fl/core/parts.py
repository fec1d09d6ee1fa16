"""A network's matched tensors, the small ones side by side, so that a pass over them takes few operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from c2m3_fl.core.identity_proof import Placed, add_squares
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.terms import densify, matched_names, working_dtype

ROW = 1024  # elements; a tensor of fewer is small
_LEAST = 32  # elements that a small tensor takes


@dataclass(frozen=True, eq=False)
class Parts:
    """The matched tensors of one network.

    Attributes
    ----------
    small : Tensor, shape (elements,)
        Those of few elements, the shortest first, each filled up with zeros to a power of two.
    large : mapping of str to Tensor
        The others as they are.
    """

    small: Tensor
    large: Mapping[str, Tensor]


@dataclass(frozen=True)
class Stretch:
    """Small tensors that take as many elements each.

    Attributes
    ----------
    names : tuple of str
        The tensors, in the order in which they lie.
    where : slice
        Where they are among the small ones.
    width : int
        Elements of each.
    """

    names: tuple[str, ...]
    where: slice
    width: int


class Layout:
    """Where the matched tensors of a network are in its parts, and where each unit is in them.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network, without rotations.
    params : mapping of str to Tensor
        A state dict that fits the spec.
    """

    def __init__(self, spec: PermutationSpec, params: Params) -> None:
        self._spec = spec
        self.names = tuple(matched_names(spec, [params]))
        self.dtype = working_dtype([params], self.names)
        self.small = tuple(name for name in self.names if params[name].numel() < ROW)
        self.large = tuple(name for name in self.names if params[name].numel() >= ROW)
        self.device = params[self.names[0]].device if self.names else torch.device("cpu")
        self._sizes = {name: params[name].numel() for name in self.small}
        widths = {name: max(_LEAST, 1 << (size - 1).bit_length()) for name, size in self._sizes.items()}
        self._starts, self._length = _slices({name: widths[name] for name in sorted(widths, key=widths.__getitem__)})
        alike = [tuple(names) for _, names in groupby(self._starts, widths.__getitem__)]
        self.stretches = tuple(
            Stretch(names, slice(self._starts[names[0]].start, self._starts[names[-1]].stop), widths[names[0]])
            for names in alike
        )
        filled = [self._starts[name].start + torch.arange(size) for name, size in self._sizes.items()]
        self._filled = torch.cat([torch.empty(0, dtype=torch.int64), *filled]).to(self.device)
        self._placed = {name: self._segments(name, params[name]) for name in self.names}
        self._offsets, self._total = _slices({name: group.size for name, group in spec.groups.items()})
        none = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0)
        found = [none, *(self._carried(name, params[name]) for name in self.small)]
        self._elements, self._units, self._times = (
            torch.cat(each).to(self.device) for each in zip(*found, strict=True)
        )
        largest = max((params[name].numel() for name in self.large), default=0)
        self._scratch = torch.empty(largest, dtype=self.dtype, device=self.device)  # for the difference of a tensor

    def _segments(self, name: str, value: Tensor) -> tuple[Placed, ...]:
        axes, dense = densify(self._spec.tensors[name], value[None])
        return Placed.all(axes, dense.shape[1:], value.device)

    def _carried(self, name: str, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which elements of a small tensor belong to which units, and how many times: by one axis or by two."""
        placed, count, first = self._placed[name], value.numel(), self._starts[name].start
        groups = {group for each in placed for group in each.segment.groups}
        if value.ndim == 1 and len(groups) == 1 and placed[0].positions is None and placed[0].segment.size == count:
            every = torch.arange(count)
            return first + every, self._offsets[placed[0].segment.group].start + every, torch.ones(count)
        one_by_one = torch.eye(count).view(count, *value.shape)
        found = {group: torch.zeros(count, self._spec.groups[group].size) for group in sorted(groups)}
        axes, dense = densify(self._spec.tensors[name], one_by_one)
        add_squares(Placed.all(axes, dense.shape[1:], dense.device), dense, slice(0, count), found)
        elements, units, times = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)], []
        for group, rows in found.items():
            element, unit = rows.nonzero(as_tuple=True)
            elements.append(first + element)
            units.append(self._offsets[group].start + unit)
            times.append(rows[element, unit])
        return torch.cat(elements), torch.cat(units), torch.cat([torch.empty(0), *times])

    def parts(self, params: Params) -> Parts:
        """The parts of a network; its large tensors are its own."""
        small = torch.zeros(self._length, dtype=self.dtype, device=self.device)
        if self.small:
            own = [params[name].detach().reshape(-1).to(self.dtype) for name in self.small]
            small.index_copy_(0, self._filled, torch.cat(own))
        return Parts(small, {name: _plain(params[name]) for name in self.large})

    def rows(self, parts: Parts) -> Tensor:
        """Small tensors of a network, filled up with zeros to the longest, shape (tensors, longest)."""
        rows = parts.small.new_zeros(len(self.small), max(self._sizes.values(), default=0))
        for row, name in zip(rows, self.small, strict=True):
            row[: self._sizes[name]] = self.tensor(parts, name)
        return rows

    def tensor(self, parts: Parts, name: str) -> Tensor:
        """One tensor of a network, flat where it is small."""
        if name not in self._sizes:
            return parts.large[name]
        return parts.small[self._starts[name]][: self._sizes[name]]

    def of_group(self, lengths: Tensor, group: str) -> Tensor:
        """The entries of a group's units, of `lengths` of one network or of several, shape (..., size)."""
        return lengths[..., self._offsets[group]]

    def carriers(self, group: str) -> list[str]:
        """The names of the tensors that carry units of a group."""
        return [n for n, placed in self._placed.items() if any(group in each.segment.groups for each in placed)]

    def lengths(self, node: Parts, centre: Parts, total: Parts | None = None, weight: float = 1.0) -> Tensor:
        """How far every unit of a network is from another one, shape (units of all groups,): see `of_group`.

        Parameters
        ----------
        node, centre : Parts
            The two networks; those of `centre` are of the working type.
        total : Parts, optional
            To which the difference is added, times `weight`.
        weight : float
            See there.
        """
        flat = torch.zeros(self._total, dtype=self.dtype, device=self.device)
        difference = node.small - centre.small
        if total is not None:
            total.small.add_(difference, alpha=weight)
        squares = difference.square_()[self._elements]
        flat.index_add_(0, self._units, squares.mul_(self._times))
        found = {name: flat[where][None] for name, where in self._offsets.items()}
        for name in self.large:
            own, other = node.large[name], centre.large[name]
            difference = torch.sub(own.to(self.dtype), other, out=self._scratch[: own.numel()].view(own.shape))
            if total is not None:
                total.large[name].add_(difference, alpha=weight)
            if self._placed[name]:
                _, dense = densify(self._spec.tensors[name], difference.square_()[None])
                add_squares(self._placed[name], dense, slice(0, 1), found)
        return flat.sqrt_()


def _slices(sizes: Mapping[str, int]) -> tuple[dict[str, slice], int]:
    """Where stretches of these sizes are, one after the other, and the size of all."""
    found, total = {}, 0
    for name, size in sizes.items():
        found[name] = slice(total, total + size)
        total += size
    return found, total


def _plain(value: Tensor) -> Tensor:
    """The tensor without its gradient: itself where it needs none, so that no other object is kept."""
    return value.detach() if value.requires_grad else value
