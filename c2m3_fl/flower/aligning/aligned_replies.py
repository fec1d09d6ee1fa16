"""The replies of a round once they are aligned: what a round, its widths and the deployment share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from operator import not_
from typing import Any

from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import norm
from c2m3_fl.flower.incoming.replies import Dropped, Reply
from c2m3_fl.flower.metrics import Numbers
from c2m3_fl.merging.widths.injections import Injection

MISFIT = "does not fit the other replies"


@dataclass(frozen=True, eq=False)
class Narrow:
    """The width of one reply.

    Attributes
    ----------
    place : int
        Which one of the strategy's sizes.
    units : mapping of str to Tensor
        For every unit of the model the reply's unit that is averaged with it, or -1.
    """

    place: int
    units: Injection


@dataclass(frozen=True, eq=False)
class AlignedReplies:
    """The replies that go to the wrapped strategy, in one basis.

    Attributes
    ----------
    replies : tuple of Reply
        As they came.
    weights : tuple of float
        What they count in a recalibration: the claimed weights, or all the same under strategies that ignore those.
    params : tuple of mappings of str to Tensor
        Their aligned params; the reply's own where nothing moved.
    moves : tuple of Permutation
        Each reply's map into the basis.
    shares : tuple of float
        Share of its units that each map moves.
    dropped : tuple of Dropped
        Outliers and copies that were left out.
    numbers : Numbers
        The match in numbers.
    fits : tuple of bool
        Which replies fit the others.
    narrow : tuple of Narrow or None
        The widths of the replies; None for the model's.
    """

    replies: tuple[Reply[Any], ...]
    weights: tuple[float, ...]
    params: tuple[Params, ...]
    moves: tuple[Permutation, ...]
    shares: tuple[float, ...]
    dropped: tuple[Dropped, ...]
    numbers: Numbers
    fits: tuple[bool, ...]
    narrow: tuple[Narrow | None, ...]

    @property
    def nodes(self) -> list[int]:
        """Who replied."""
        return [reply.node for reply in self.replies]

    @property
    def sizes(self) -> list[float]:
        """Norms of the aligned params."""
        pairs = zip(self.replies, self.params, strict=True)
        return [
            norm(params) if reply.size is None or params is not reply.params else reply.size for reply, params in pairs
        ]

    def only(self, kept: Sequence[bool], reason: str = MISFIT) -> AlignedReplies:
        """Some of the replies; the others are dropped for a reason."""
        left_out = [Dropped(node, reason) for node in compress(self.nodes, map(not_, kept))]
        return replace(
            self,
            replies=tuple(compress(self.replies, kept)),
            weights=tuple(compress(self.weights, kept)),
            params=tuple(compress(self.params, kept)),
            moves=tuple(compress(self.moves, kept)),
            shares=tuple(compress(self.shares, kept)),
            dropped=(*self.dropped, *left_out),
            fits=tuple(compress(self.fits, kept)),
            narrow=tuple(compress(self.narrow, kept)),
        )
