"""Inner products of the drifts of nodes from one network, of several new nodes at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from c2m3_fl.core.parts import ROW, Layout, Parts

_NODES, _LENGTH = 16, 8 * ROW  # at a time, of a large tensor, so that temporaries stay in cache
_AT_A_TIME = _NODES * _LENGTH  # elements of all small tensors


class Multiplier:
    """Multiplies drifts, tensor by tensor; a product does not depend on which other nodes are multiplied with it.

    Parameters
    ----------
    layout : Layout
        Of the network.
    start : Parts
        From where the nodes drifted, of the working type.
    """

    def __init__(self, layout: Layout, start: Parts) -> None:
        self._layout, self._start = layout, start
        self._places = {name: place for place, name in enumerate(layout.names)}
        self._scratch = [torch.empty(0, dtype=layout.dtype, device=layout.device)] * 3

    def rows(self, nodes: Sequence[Parts], first: int) -> list[Tensor]:
        """Products of every drift from a number on with those up to itself and with the start.

        Parameters
        ----------
        nodes : sequence of Parts
            The nodes.
        first : int
            From which one on.

        Returns
        -------
        list of Tensor of float64, shape (tensors, nodes up to itself + 1)
            Of each node; the product with the start is the last one.
        """
        every = [self._start, *nodes]
        uptos = range(first + 2, len(every) + 1)  # of each new node: up to which of these it is multiplied
        found = [torch.empty(len(self._places), upto, dtype=torch.float64) for upto in uptos]
        self._multiply_small([each.small for each in every], uptos, found)
        for name in self._layout.large:
            sums = self._multiply([each.large[name].reshape(-1) for each in every], uptos)
            for each, own in zip(found, sums, strict=True):
                each[self._places[name]] = own
        return [torch.cat([each[:, 1:], each[:, :1]], 1) for each in found]

    def _multiply_small(self, values: Sequence[Tensor], uptos: Sequence[int], into: Sequence[Tensor]) -> None:
        """The products of all small tensors, a few nodes at a time; the first value is the start."""
        stretches = self._layout.stretches
        small = [self._places[name] for each in stretches for name in each.names]
        at_once = max(1, _AT_A_TIME // max(1, len(values[0])))
        new = self._drifts(0, values[uptos[0] - 1 :], values[0])
        for low in range(0, len(values) if small else 0, at_once):
            part = self._drifts(1, values[low : low + at_once], values[0])
            for upto, own, products in zip(uptos, new, into, strict=True):
                earlier = part[: upto - low] if upto > low else part[:0]
                product = torch.mul(earlier, own, out=self._room(2, earlier.shape))
                sums = [
                    product[:, each.where].view(len(earlier), len(each.names), each.width).sum(2, dtype=torch.float64)
                    for each in stretches
                ]
                products[small, low : low + len(earlier)] = torch.cat(sums, 1).T.cpu()

    def _multiply(self, values: Sequence[Tensor], uptos: Sequence[int]) -> list[Tensor]:
        """The products of one large tensor, a stretch of a few nodes at a time; the first value is the start."""
        count, first = len(values[0]), uptos[0] - 1
        totals = [torch.zeros(upto, dtype=torch.float64) for upto in uptos]
        blocks = [values[0].new_empty(upto, count // ROW) for upto in uptos]
        for low in range(0, count, _LENGTH):
            stretch = [value[low : low + _LENGTH] for value in values]
            length = len(stretch[0])
            whole = length // ROW
            where = slice(low // ROW, low // ROW + whole)
            new = self._drifts(0, stretch[first:], stretch[0])
            for low_node in range(0, len(values), _NODES):
                part = self._drifts(1, stretch[low_node : low_node + _NODES], stretch[0])
                for upto, own, total, sums in zip(uptos, new, totals, blocks, strict=True):
                    nodes = slice(low_node, min(upto, low_node + _NODES))
                    earlier = part[: max(0, upto - low_node)]
                    product = torch.mul(earlier, own, out=self._room(2, earlier.shape))
                    rows = product[:, : whole * ROW].view(len(earlier), whole, ROW)
                    torch.sum(rows, 2, out=sums[nodes, where])
                    if whole * ROW < length:
                        total[nodes] += product[:, whole * ROW :].sum(1, dtype=torch.float64).cpu()
        return [total + sums.sum(1, dtype=torch.float64).cpu() for total, sums in zip(totals, blocks, strict=True)]

    def _drifts(self, room: int, values: Sequence[Tensor], start: Tensor) -> Tensor:
        """The differences of some values from the start, which stays as it is where it is one of them."""
        found = self._room(room, torch.Size((len(values), len(start))))
        torch.stack([value.to(self._layout.dtype) for value in values], out=found)
        found[1 if values[0] is start else 0 :].sub_(start)
        return found

    def _room(self, number: int, shape: torch.Size) -> Tensor:
        """One of three scratch tensors, in this shape."""
        if self._scratch[number].numel() < shape.numel():
            self._scratch[number] = self._scratch[number].new_empty(shape.numel())
        return self._scratch[number][: shape.numel()].view(shape)
