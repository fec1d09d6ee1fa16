"""What both strategies may be told by keyword."""

from __future__ import annotations

from typing import Literal, TypedDict

import numpy as np
import torch

from c2m3_fl.core.problem import check_search
from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.aligner import Basis, Mode
from c2m3_fl.merging.recalibrate.setting import usable_device


class Options(TypedDict, total=False):
    """What both strategies may be told by keyword, beyond the model and the calibration data.

    Attributes
    ----------
    alignment : {"joint", "separate"}
        "joint" (default) matches all replies with each other; "separate" matches each one with nothing but the
        model that was sent out, so that no client's permutation depends on another client.
    basis : {"global", "largest", "client"} or int
        "global" (default): every round ends in the basis of the model that was sent out. "client": the same, and
        every client is sent the model in the neuron order that it last replied in, so that state which it keeps
        still fits. "largest" or a node id: the basis of that reply; a wrapped strategy with state of its own
        (momenta) wants one of the others.
    min_replies : int
        With fewer valid replies than this (default 1), not counting outliers that are dropped, the previous
        global model stays.
    outliers : {"report", "drop"}
        Whether replies that do not fit the others are named only (default), or left out as well.
    memory : int
        How many nodes' permutations to remember between rounds (default 1000).
    max_steps : int
        Upper limit of the solver's steps before it polishes (default 100).
    tolerance : float
        Relative duality gap at which the solver stops (default 1e-4).
    diagnostics : bool
        Whether the metrics also hold the agreement of every tensor of every client.
    """

    alignment: Mode
    basis: Basis
    min_replies: int
    outliers: Literal["report", "drop"]
    memory: int
    max_steps: int
    tolerance: float
    diagnostics: bool


_DEFAULTS = Options(
    alignment="joint",
    basis="global",
    min_replies=1,
    outliers="report",
    memory=1000,
    max_steps=100,
    tolerance=1e-4,
    diagnostics=False,
)


def resolved(options: Options) -> Options:
    """All options, the defaults filled in; raise `ConfigError` for unknown ones and for values out of range."""
    unknown = sorted(set(options) - set(_DEFAULTS))
    if unknown:
        raise ConfigError(f"unknown options {unknown}; beside the named arguments there are {sorted(_DEFAULTS)}")
    full: Options = {**_DEFAULTS, **options}
    _check_whole("min_replies", full["min_replies"], 1)
    _check_whole("memory", full["memory"], 0)
    _check_whole("max_steps", full["max_steps"], 0)
    _check_number("tolerance", full["tolerance"])
    check_search(full["max_steps"], full["tolerance"])
    if full["outliers"] not in ("report", "drop"):
        raise ConfigError(f"outliers is {full['outliers']!r}, expected 'report' or 'drop'")
    return full


def resolved_device(device: torch.device | str | None) -> torch.device:
    """Where to compute, by default CUDA when there is one; raise `ConfigError` for what cannot be computed on."""
    return usable_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ConfigError(f"{name} is {value!r}, expected a whole number, at least {least}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise ConfigError(f"{name} is {value!r}, expected a number")
