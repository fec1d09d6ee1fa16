"""What must be known of the strategies that C2M3 wraps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar, cast

from flwr.server import strategy as legacy
from flwr.serverapp.strategy import Bulyan, FedMedian, FedTrimmedAvg, MultiKrum, Strategy

Wrapping = TypeVar("Wrapping")

_ROBUST = (
    Bulyan,
    FedMedian,
    FedTrimmedAvg,
    MultiKrum,  # Krum derives from it
    legacy.Bulyan,
    legacy.FedMedian,
    legacy.FedTrimmedAvg,
    legacy.Krum,
)


def chain(strategy: Wrapping) -> Iterator[Wrapping]:
    """A strategy, current or legacy, and those that it wraps, outermost first."""
    inner: object = strategy
    while isinstance(inner, Strategy | legacy.Strategy):
        yield cast(Wrapping, inner)
        inner = getattr(inner, "strategy", None)


def ignores_weights(strategy: object) -> bool:
    """Whether the strategy lets every client count the same, whatever number of examples it claims.

    Then the match must do so too, or one hostile client's claim decides where all others go.
    """
    return any(isinstance(each, _ROBUST) for each in chain(strategy))
