"""Numbers that users give, checked: each error names the option, what it was and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from c2m3_fl.errors import ConfigError


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise `ConfigError` for anything but a whole number of at least `least`, and of at most `most`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]  # a number here
        upper = "" if most is None else f", at most {most}"
        raise ConfigError(f"{name} is {value!r}, expected a whole number, at least {least}{upper}")


def is_number(value: object) -> bool:
    """Whether a value is a number, NaN and infinities included; truth values are none."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def check_number(name: str, value: object, least: float = -math.inf, most: float = math.inf) -> None:
    """Raise `ConfigError` for anything but a finite number from `least` to `most`."""
    if not is_number(value) or not math.isfinite(value) or not least <= value <= most:  # type: ignore[arg-type,operator]  # as above
        bounds = [f"at least {least:g}"] * (least > -math.inf) + [f"at most {most:g}"] * (most < math.inf)
        raise ConfigError(f"{name} is {value!r}, expected {', '.join(['a finite number', *bounds])}")


def check_positive(name: str, value: object) -> None:
    """Raise `ConfigError` for anything but a finite number above 0."""
    if not is_number(value) or not math.isfinite(value) or not value > 0:  # type: ignore[arg-type,operator]  # as above
        raise ConfigError(f"{name} is {value!r}, expected a finite number above 0")


def check_all_positive(name: str, values: object) -> None:
    """Raise `ConfigError` for anything but a sequence of at least one number, all finite and above 0."""
    right = isinstance(values, Sequence) and not isinstance(values, str | bytes) and len(values) > 0
    if not right or not all(is_number(each) and math.isfinite(each) and each > 0 for each in values):  # type: ignore[attr-defined]  # a sequence here
        raise ConfigError(f"{name} is {values!r}, expected a tuple of at least one number, all finite and above 0")


def check_flag(name: str, value: object) -> None:
    """Raise `ConfigError` for anything but True and False."""
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"{name} is {value!r}, expected True or False")
