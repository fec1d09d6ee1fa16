"""Adapters that clients train on one base, aggregated as the products that they add to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar, get_args

from flwr.server import strategy as legacy
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.aligning.aligned_replies import AlignedReplies
from c2m3_fl.flower.rounds import Aggregate
from c2m3_fl.flower.setup import Setup
from c2m3_fl.flower.wrapped import chain
from c2m3_fl.merging.lora import average_adapters, check_adapters, residuals
from c2m3_fl.merging.lora_base import Base, find_bases

Lora = Literal["apart", "exact", "residual"]
Metrics = TypeVar("Metrics")


def check_lora(lora: str, strategy: object) -> None:
    """Raise `ConfigError` for an unknown way to aggregate adapters, and for a strategy that does not average."""
    if lora not in get_args(Lora):
        raise ConfigError(f"lora is {lora!r}, expected 'apart', 'exact' or 'residual'")
    if lora == "apart":
        return
    for each in chain(strategy):
        ways = ((FedAvg, "aggregate_train"), (legacy.FedAvg, "aggregate_fit"))
        if not any(getattr(type(each), name, None) is getattr(kind, name) for kind, name in ways):
            raise ConfigError(
                f"lora={lora!r} averages, which {type(each).__name__} does not: wrap FedAvg or FedProx, or leave it out"
            )


def bases_of(lora: Lora, setup: Setup) -> Mapping[str, Base]:
    """The weights to which is added what the products leave out, by A's name; none where nothing is added.

    Parameters
    ----------
    lora : {"apart", "exact", "residual"}
        How adapters are averaged.
    setup : Setup
        Of the strategy.

    Raises
    ------
    ConfigError
        Where the exchanged arrays hold no adapters that `lora` can average, or lack the weights to add to.
    """
    if lora == "apart":
        return {}
    pairs = check_adapters(setup.state_dict())
    if lora == "exact":
        return {}
    known, wire = find_bases(setup.model, setup.data.example), {own: name for name, own in setup.names.items()}
    bases = {down: known[setup.names.get(down, down)] for down, _ in pairs}
    found = {down: Base(wire.get(base.name, base.name), base.scale, base.transposed) for down, base in bases.items()}
    missing = [base.name for base in found.values() if base.name not in setup.spec.tensors]
    if missing:
        raise ConfigError(
            f"lora='residual' changes {missing[:5]}, which the clients do not exchange and so never receive: exchange "
            "them, too, or pass lora='exact'"
        )
    return found


def averaging_products(aggregate: Aggregate[Metrics], bases: Mapping[str, Base]) -> Aggregate[Metrics]:
    """The same aggregation, with A and B of every adapter from the weighted mean of their products.

    Parameters
    ----------
    aggregate : callable
        From the aligned replies to the wrapped strategy's arrays and metrics.
    bases : mapping of str to Base
        The weights to which is added what the products leave out, by A's name.
    """

    def exactly(aligned: AlignedReplies) -> tuple[Params | None, Metrics | None]:
        params, metrics = aggregate(aligned)
        if params is None:
            return None, metrics
        found = average_adapters(aligned.params, aligned.weights)
        rests = residuals(aligned.params, aligned.weights, found) if bases else {}
        folded = {bases[down].name: bases[down].plus(params[bases[down].name], rest) for down, rest in rests.items()}
        return {**params, **found, **folded}, metrics

    return exactly
