"""What must be known of the strategies that C2M3 wraps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar, cast

from flwr.server import strategy as legacy
from flwr.serverapp.strategy import Bulyan, FedMedian, FedTrimmedAvg, MultiKrum, Strategy

from c2m3_fl.errors import ConfigError

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


def rewinding(strategy: object) -> Callable[[], None]:
    """What takes a strategy, and those that it wraps, back to where they are now.

    After a round that came to nothing: a momentum that holds NaN would never recover.
    """
    before = [(each, dict(vars(each))) for each in chain(strategy)]

    def rewind() -> None:
        for each, state in before:
            vars(each).clear()
            vars(each).update(state)

    return rewind


def check_instance(strategy: object, kind: type[object]) -> None:
    """Raise `ConfigError` unless the strategy is an instance of `kind`, the current or the legacy base."""
    if isinstance(strategy, type):
        raise ConfigError(
            f"strategy is the class {strategy.__name__}, expected an instance of it, {strategy.__name__}()"
        )
    if not isinstance(strategy, kind):
        found, expected = (f"{each.__module__}.{each.__qualname__}" for each in (type(strategy), kind))
        raise ConfigError(f"strategy is a {found}, expected an instance of {expected}")


def ignores_weights(strategy: object) -> bool:
    """Whether the strategy lets every client count the same, whatever number of examples it claims.

    Then the match must do so too, or one hostile client's claim decides where all others go.
    """
    return any(isinstance(each, _ROBUST) for each in chain(strategy))
