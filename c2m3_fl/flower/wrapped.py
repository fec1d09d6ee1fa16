"""The wrapped strategies: their chain, their state, and what they return."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from logging import WARNING
from typing import TypeVar, cast

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.server import strategy as legacy
from flwr.serverapp.strategy import (
    Bulyan,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedXgbBagging,
    FedXgbCyclic,
    MultiKrum,
    QFedAvg,
    Strategy,
)
from flwr.serverapp.strategy.fedopt import FedOpt
from flwr.supercore import log
from torch import Tensor, nn

from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.state_dicts import check_finite
from c2m3_fl.errors import ConfigError, ParamsError

Wrapping = TypeVar("Wrapping")

_TAKERS = ((Strategy, "C2M3"), (legacy.Strategy, "LegacyC2M3 of c2m3_fl.flower"))
_TREES = (FedXgbBagging, FedXgbCyclic, legacy.FedXgbBagging, legacy.FedXgbCyclic, legacy.FedXgbNnAvg)
LARGEST = float(np.sqrt(np.finfo(np.float32).max))  # 1.8e19: the square of anything larger overflows float32

_UNWEIGHTED = (
    Bulyan,
    FedMedian,
    FedTrimmedAvg,
    MultiKrum,  # Krum derives from it
    QFedAvg,  # weighs by losses
    legacy.Bulyan,
    legacy.FedMedian,
    legacy.FedTrimmedAvg,
    legacy.Krum,
    legacy.QFedAvg,
)


def chain(strategy: Wrapping) -> Iterator[Wrapping]:
    """A strategy, current or legacy, and those that it wraps, outermost first."""
    inner: object = strategy
    while isinstance(inner, Strategy | legacy.Strategy):
        yield cast(Wrapping, inner)
        inner = getattr(inner, "strategy", None)


def check_instance(strategy: object, kind: type[object], wrapper: type[object]) -> None:
    """Raise `ConfigError` unless the strategy is one of `kind`, the current or the legacy base, and no `wrapper`."""
    if isinstance(strategy, type):
        raise ConfigError(
            f"strategy is the class {strategy.__name__}, expected an instance of it, {strategy.__name__}()"
        )
    if not isinstance(strategy, kind):
        found, expected = (f"{each.__module__}.{each.__qualname__}" for each in (type(strategy), kind))
        remedy = "".join(f"; use {name}, which takes it" for each, name in _TAKERS if isinstance(strategy, each))
        remedy += "; pass the network as model=" if isinstance(strategy, nn.Module) else ""
        raise ConfigError(f"strategy is a {found}, expected an instance of {expected}{remedy}")
    for each in chain(strategy):
        if isinstance(each, _TREES):
            raise ConfigError(
                f"strategy is a {type(each).__name__}, which collects trees of XGBoost: they have no neurons to align, "
                "so use it without C2M3"
            )
    if isinstance(strategy, wrapper):
        raise ConfigError(
            f"strategy is a {wrapper.__name__} already, which would align and repair twice: pass what is inside it"
        )


def warn_of_start(strategies: Iterable[object]) -> None:
    """Log every wrapped strategy whose class overrides ``start``: only that of the outermost strategy ever runs."""
    for each in strategies:
        start = getattr(each, "start", None)
        if start is not None and start.__module__.partition(".")[0] not in ("flwr", __package__.partition(".")[0]):
            name = type(each).__name__
            log(
                WARNING,
                "%s overrides start(), which never runs inside of another strategy: do that in aggregate_train or in "
                "evaluate_fn, or derive %s from C2M3 and start it itself",
                name,
                name,
            )


def stock_averages(strategy: object) -> list[FedAvg]:
    """The strategies of a chain that average by a weight, outermost first."""
    return [each for each in chain(strategy) if isinstance(each, FedAvg)]


def record_keys(strategy: object) -> tuple[str, str, str]:
    """Names of the arrays, the config and the averaging weight, as the innermost averaging strategy has them."""
    averages = stock_averages(strategy)
    if not averages:
        return "arrays", "config", "num-examples"
    return averages[-1].arrayrecord_key, averages[-1].configrecord_key, averages[-1].weighted_by_key


def required_metrics(strategy: object) -> list[str]:
    """Metrics without which the wrapped strategy cannot aggregate."""
    return [each.train_loss_key for each in chain(strategy) if isinstance(each, QFedAvg)]


def continue_from(strategy: object, arrays: ArrayRecord) -> None:
    """Let server momentum step from the model that is sent out.

    FedAvgM remembers its own last result, and takes no notice of what its caller sends: of a new start, or of a
    deployed model that is fed back.
    """
    for each in chain(strategy):
        if isinstance(each, FedAvgM) and each.current_arrays is not None:
            each.current_arrays = arrays.copy()


def ignores_weights(strategy: object) -> bool:
    """Whether the strategy gives every client the same weight, whatever number of examples it claims.

    Then the match must do so too, or one hostile client's claim decides where all the others go.
    """
    return any(isinstance(each, _UNWEIGHTED) for each in chain(strategy))


def remembers_squares(strategy: object) -> bool:
    """Whether the strategy divides its steps by squares of earlier ones: one huge reply would freeze later rounds."""
    return any(isinstance(each, FedOpt | legacy.FedOpt) for each in chain(strategy))


def refuse_steps(strategy: object, spec: PermutationSpec) -> None:
    """Raise `ConfigError` where a strategy steps from the model that was sent to replies that are folded and rotated.

    The fold would count as progress, and so would the rotation.
    """
    for each in chain(strategy) if spec.rotations else ():
        if isinstance(each, FedOpt | legacy.FedOpt | FedAvgM | legacy.FedAvgM | QFedAvg | legacy.QFedAvg):
            raise ConfigError(
                f"strategy is a {type(each).__name__}, which steps from the model that was sent out, and rotations "
                "change the weights of what is aggregated; use a strategy that averages, leave out rotations=True, or "
                "pass a spec without rotations"
            )


def restore_types(aggregated: Params, replies: Sequence[Params]) -> dict[str, Tensor]:
    """A strategy's result, bit for bit where it is floating, in the key order of the replies.

    Integer and boolean tensors take the largest reply's value: strategies average them as floats.

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
    check_finite(typed_like(first, result))  # in the types that a client computes with
    ends = [torch.aminmax(value) for value in result.values() if value.is_floating_point() and value.numel()]
    largest_value = max((max(-float(low), float(high)) for low, high in ends), default=0.0)
    if largest_value > LARGEST:
        raise ParamsError(f"the wrapped strategy's result has values of {largest_value:.3g}, whose squares overflow")
    return result


def typed_like(example: Params, params: Params) -> dict[str, Tensor]:
    """The same tensors, each of the element type that it has in the example."""
    return {name: value.to(example[name].dtype) for name, value in params.items()}
