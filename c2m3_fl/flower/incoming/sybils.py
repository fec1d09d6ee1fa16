"""Replies that only the alignment brought together: one model in several orders of its units is one vote."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from flwr.server import strategy as legacy
from flwr.serverapp.strategy import Bulyan, MultiKrum
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.core.stacked import stacked
from c2m3_fl.flower.wrapped import chain

_BY_DISTANCE = (Bulyan, MultiKrum, legacy.Bulyan, legacy.Krum)  # the current Krum derives from MultiKrum
_NEAR = 0.1  # of what typically lies between two replies, and between either one and the model that was sent out


def votes_by_distance(strategy: object) -> bool:
    """Whether a strategy, or one that it wraps, selects replies by their distances: Krum, MultiKrum or Bulyan."""
    return any(isinstance(each, _BY_DISTANCE) for each in chain(strategy))


def find_copies(received: Sequence[Params], aligned: Sequence[Params], sent: Params) -> dict[int, int]:
    """The replies that coincide with an earlier one after the alignment but did not before, and with which.

    Strategies that select by distance would take them for that many nodes that agree, where the replies as they came
    lie far apart. Two replies coincide when less than a tenth lies between them of what typically lies between two,
    and of what lies between either one and the model that was sent out: clients that are idle or that trained
    little keep their votes.

    Parameters
    ----------
    received : sequence of mappings of str to Tensor
        The replies as they came.
    aligned : sequence of mappings of str to Tensor
        The same in one basis; a reply that nothing moved is the very one that came in.
    sent : mapping of str to Tensor
        The model that was sent out, in that basis.
    """
    if all(own is moved for own, moved in zip(received, aligned, strict=True)):
        return {}
    updates = _products(aligned, sent)
    apart, lengths = _distances(updates), updates.diagonal().clamp(min=0).sqrt()
    trained = lengths > 0
    pairs = torch.ones_like(apart, dtype=torch.bool).triu(1) & trained[:, None] & trained
    if not pairs.any():
        return {}
    limit = _NEAR * torch.minimum(lengths[:, None], lengths).clamp(max=float(apart[pairs].quantile(0.5)))
    copies = pairs & (apart < limit) & (apart < _NEAR * _distances(_products(received, sent)))
    found: dict[int, int] = {}
    for first, second in copies.nonzero().tolist():  # row by row: the first of several is the one that counts
        if first not in found:
            found.setdefault(second, first)
    return found


def _products(params: Sequence[Params], origin: Params) -> Tensor:
    """Inner products of differences from `origin`, over all floating tensors, shape (replies, replies)."""
    total = torch.zeros(len(params), len(params), dtype=torch.float64)
    floating = [name for name, start in origin.items() if start.is_floating_point()]
    for _, values, start in stacked(floating, params, origin):
        total += (values - start) @ (values - start).T
    return total


def _distances(products: Tensor) -> Tensor:
    squares = products.diagonal()
    return (squares[:, None] + squares - 2 * products).clamp(min=0).sqrt()
