"""What must be known of the strategies that C2M3 wraps, and of what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

from flwr.server import strategy as legacy
from flwr.serverapp.strategy import Bulyan, FedMedian, FedTrimmedAvg, MultiKrum, Strategy
from torch import Tensor

from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import check_finite
from c2m3_fl.errors import ConfigError, ParamsError

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


def check_instance(strategy: object, kind: type[object], wrapper: type[object]) -> None:
    """Raise `ConfigError` unless the strategy is one of `kind`, the current or the legacy base, and no `wrapper`."""
    if isinstance(strategy, type):
        raise ConfigError(
            f"strategy is the class {strategy.__name__}, expected an instance of it, {strategy.__name__}()"
        )
    if not isinstance(strategy, kind):
        found, expected = (f"{each.__module__}.{each.__qualname__}" for each in (type(strategy), kind))
        raise ConfigError(f"strategy is a {found}, expected an instance of {expected}")
    if isinstance(strategy, wrapper):
        raise ConfigError(
            f"strategy is a {wrapper.__name__} already, which would align and repair twice: pass what is inside it"
        )


def ignores_weights(strategy: object) -> bool:
    """Whether the strategy lets every client count the same, whatever number of examples it claims.

    Then the match must do so too, or one hostile client's claim decides where all others go.
    """
    return any(isinstance(each, _ROBUST) for each in chain(strategy))


def restored(aggregated: Params, replies: Sequence[Params]) -> dict[str, Tensor]:
    """What a strategy returned, bit for bit where it is floating, in the key order of the replies.

    Integer and boolean tensors take the largest reply's value: no strategy's arithmetic is for them.

    Raises
    ------
    ParamsError
        When tensors are missing, of another shape or not finite.
    """
    first = replies[0]
    if aggregated.keys() != first.keys():
        differing = sorted(aggregated.keys() ^ first.keys())
        raise ParamsError(f"the wrapped strategy's result differs from the replies in keys {differing[:5]}")
    counters = [name for name, value in first.items() if not value.is_floating_point()]
    largest = weighted_mean([{name: reply[name] for name in counters} for reply in replies])
    result = {}
    for name, value in first.items():
        found = aggregated[name]
        if found.shape != value.shape:
            shapes = f"{tuple(found.shape)}, expected {tuple(value.shape)}"
            raise ParamsError(f"the wrapped strategy's result: {name!r} has shape {shapes}")
        result[name] = largest.get(name, found if found.is_floating_point() else found.to(value.dtype))
    check_finite(typed_like(first, result))  # a client would compute with no more than that
    return result


def typed_like(example: Params, params: Params) -> dict[str, Tensor]:
    """The same tensors, each of the element type that it has in the example."""
    return {name: value.to(example[name].dtype) for name, value in params.items()}
