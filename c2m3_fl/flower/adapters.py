"""Adapters that clients train on one base, aggregated as the products that they add to it."""

from __future__ import annotations

from logging import INFO
from typing import TypeVar

from flwr.serverapp.strategy import FedAvg
from flwr.supercore import log

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.rounds import Aggregate, AlignedReplies
from c2m3_fl.flower.wrapped import chain
from c2m3_fl.merging.lora import average_adapters

Metrics = TypeVar("Metrics")


def check_lora(lora: str, strategy: object) -> None:
    """Raise `ConfigError` for an unknown way to aggregate adapters, and for a strategy that does not average."""
    if lora not in ("apart", "exact"):
        raise ConfigError(f"lora is {lora!r}, expected 'apart' or 'exact'")
    if lora == "exact":
        for each in chain(strategy):
            averages = getattr(type(each), "aggregate_train", None) is FedAvg.aggregate_train
            if not averages:
                name = type(each).__name__
                raise ConfigError(
                    f"lora='exact' averages, which {name} does not: wrap FedAvg or FedProx, or leave it out"
                )


def averaging_products(aggregate: Aggregate[Metrics]) -> Aggregate[Metrics]:
    """The same aggregation, with A and B of every adapter from the weighted mean of their products.

    Parameters
    ----------
    aggregate : callable
        From the aligned replies to the wrapped strategy's arrays and metrics.
    """

    def exactly(aligned: AlignedReplies) -> tuple[Params | None, Metrics | None]:
        params, metrics = aggregate(aligned)
        if params is None:
            return None, metrics
        found = average_adapters(aligned.params, aligned.weights)
        log(INFO, "\t> %d adapters are averaged as products", len(found) // 2)
        return {**params, **found}, metrics

    return exactly
