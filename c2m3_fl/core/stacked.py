"""The values of all nodes side by side, a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params

_AT_A_TIME = 1 << 17  # values of each node, so that many nodes of a large network take little memory
_OF_ALL = 1 << 18  # values of all nodes


def stacked(names: Iterable[str], params: Sequence[Params], origin: Params) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Stretches of tensors of all params, as float64, whose squares do not overflow.

    Parameters
    ----------
    names : iterable of str
        The tensors.
    params : sequence of mappings of str to Tensor
        State dicts, not mutated.
    origin : mapping of str to Tensor
        One more.

    Yields
    ------
    name : str
        The tensor.
    values : Tensor of float64, shape (params, length)
        A stretch of it in all params.
    start : Tensor of float64, shape (length,)
        The same stretch in `origin`.
    """
    for name in names:
        flat = [each[name].detach().flatten() for each in params]
        start = origin[name].detach().flatten()
        length = min(_AT_A_TIME, max(1, _OF_ALL // len(params)))
        for low in range(0, len(start), length):
            part = slice(low, low + length)
            yield name, torch.stack([each[part].double() for each in flat]), start[part].double()
