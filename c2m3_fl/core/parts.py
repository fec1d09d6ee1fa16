"""A network's matched tensors, the small ones side by side, so that a pass over them takes few operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core.identity_proof import Placed, add_squares
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.terms import densify, matched_names, working_dtype

ROW = 1024  # elements; a tensor of fewer is small


@dataclass(frozen=True, eq=False)
class Parts:
    """The matched tensors of one network.

    Attributes
    ----------
    small : Tensor, shape (small tensors, longest)
        Those of few elements, filled up with zeros.
    large : mapping of str to Tensor
        The others as they are.
    """

    small: Tensor
    large: Mapping[str, Tensor]


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
        self._width = max(self._sizes.values(), default=0)
        filled = [place * self._width + torch.arange(size) for place, size in enumerate(self._sizes.values())]
        self._filled = torch.cat(filled).to(self.device) if filled else torch.empty(0, dtype=torch.int64)
        self._placed = {name: self._segments(name, params[name]) for name in self.names}
        self._offsets, total = {}, 0
        for name, group in spec.groups.items():
            self._offsets[name] = slice(total, total + group.size)
            total += group.size
        self._total = total
        none = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0)
        found = [none, *(self._carried(place, name, params[name]) for place, name in enumerate(self.small))]
        self._elements, self._units, self._times = (
            torch.cat(each).to(self.device) for each in zip(*found, strict=True)
        )

    def _segments(self, name: str, value: Tensor) -> tuple[Placed, ...]:
        axes, dense = densify(self._spec.tensors[name], value[None])
        return Placed.all(axes, dense.shape[1:], value.device)

    def _carried(self, place: int, name: str, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which elements of a small tensor belong to which units, and how many times: by one axis or by two."""
        placed, count = self._placed[name], value.numel()
        groups = {group for each in placed for group in each.segment.groups}
        if value.ndim == 1 and len(groups) == 1 and placed[0].positions is None and placed[0].segment.size == count:
            every = torch.arange(count)
            return place * self._width + every, self._offsets[placed[0].segment.group].start + every, torch.ones(count)
        one_by_one = torch.eye(count).view(count, *value.shape)
        found = {group: torch.zeros(count, self._spec.groups[group].size) for group in sorted(groups)}
        axes, dense = densify(self._spec.tensors[name], one_by_one)
        add_squares(Placed.all(axes, dense.shape[1:], dense.device), dense, slice(0, count), found)
        elements, units, times = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)], []
        for group, rows in found.items():
            element, unit = rows.nonzero(as_tuple=True)
            elements.append(place * self._width + element)
            units.append(self._offsets[group].start + unit)
            times.append(rows[element, unit])
        return torch.cat(elements), torch.cat(units), torch.cat([torch.empty(0), *times])

    def parts(self, params: Params) -> Parts:
        """The parts of a network; its large tensors are its own."""
        small = torch.zeros(len(self.small), self._width, dtype=self.dtype, device=self.device)
        if self.small:
            own = [params[name].detach().reshape(-1).to(self.dtype) for name in self.small]
            small.view(-1).index_copy_(0, self._filled, torch.cat(own))
        return Parts(small, {name: params[name].detach() for name in self.large})

    def tensor(self, parts: Parts, name: str) -> Tensor:
        """One tensor of a network, flat where it is small."""
        return parts.large[name] if name in parts.large else parts.small[self.small.index(name), : self._sizes[name]]

    def carriers(self, group: str) -> list[str]:
        """The names of the tensors that carry units of a group."""
        return [n for n, placed in self._placed.items() if any(group in each.segment.groups for each in placed)]

    def lengths(self, node: Parts, centre: Parts, total: Parts | None = None, weight: float = 1.0) -> dict[str, Tensor]:
        """How far every unit of a network is from another one, per group.

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
        squares = difference.square_().view(-1)[self._elements]
        flat.index_add_(0, self._units, squares.mul_(self._times))
        found = {name: flat[where][None] for name, where in self._offsets.items()}
        for name in self.large:
            difference = node.large[name].to(self.dtype) - centre.large[name]
            if total is not None:
                total.large[name].add_(difference, alpha=weight)
            if self._placed[name]:
                _, dense = densify(self._spec.tensors[name], difference.square_()[None])
                add_squares(self._placed[name], dense, slice(0, 1), found)
        return {name: square[0].sqrt() for name, square in found.items()}
