"""Numbers that users give, checked: each error names the option, what it was and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import numpy as np

from c2m3_fl.errors import ConfigError


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise `ConfigError` for anything but a whole number of at least `least`, and of at most `most`."""
    if not _whole(value) or value < least or (most is not None and value > most):
        upper = "" if most is None else f", at most {most}"
        raise ConfigError(f"{name} is {value!r}, expected a whole number, at least {least}{upper}")


def check_number(name: str, value: object, least: float = -math.inf, most: float = math.inf) -> None:
    """Raise `ConfigError` for anything but a finite number from `least` to `most`."""
    if not _finite(value) or not least <= value <= most:
        bounds = [f"at least {least:g}"] * (least > -math.inf) + [f"at most {most:g}"] * (most < math.inf)
        raise ConfigError(f"{name} is {value!r}, expected {', '.join(['a finite number', *bounds])}")


def check_positive(name: str, value: object) -> None:
    """Raise `ConfigError` for anything but a finite number above 0."""
    if not _finite(value) or not value > 0:
        raise ConfigError(f"{name} is {value!r}, expected a finite number above 0")


def check_all_positive(name: str, values: object) -> None:
    """Raise `ConfigError` for anything but a sequence of at least one number, all finite and above 0."""
    given = values if isinstance(values, Sequence) and not isinstance(values, str | bytes) else ()
    if not given or not all(_finite(each) and each > 0 for each in given):
        raise ConfigError(f"{name} is {values!r}, expected a tuple of at least one number, all finite and above 0")


def check_flag(name: str, value: object) -> None:
    """Raise `ConfigError` for anything but True and False."""
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"{name} is {value!r}, expected True or False")


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _finite(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number; truth values are none."""
    return _whole(value) or (isinstance(value, float | np.floating) and math.isfinite(value))
