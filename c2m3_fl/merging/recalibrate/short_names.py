"""The recalibrations of an average, and their short names."""

from __future__ import annotations

from typing import Protocol

from c2m3_fl.core.state_dicts import same
from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.merging.recalibrate.auto import Auto
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.repair import BatchNormStatistics, Repair
from c2m3_fl.merging.recalibrate.setting import Setting
from c2m3_fl.merging.reports import Recalibrated, RecalibrationReport


class Recalibration(Protocol):
    """Corrects an averaged network by its aligned endpoints' outputs on calibration data."""

    def __call__(self, setting: Setting) -> Recalibrated:
        """Return the corrected state dict and a report."""
        ...


SHORT_NAMES: dict[str, Recalibration | None] = {
    "auto": Auto(),
    "none": None,
    "batchnorm": BatchNormStatistics(),
    "repair": Repair(),
    "refit": Refit(),
}


def recalibrate(recalibration: Recalibration, setting: Setting) -> Recalibrated:
    """Apply a recalibration; if all endpoints are the same network, there is nothing to correct."""
    if all(same(setting.merged, endpoint) for endpoint in setting.endpoints):
        return Recalibrated(dict(setting.merged), RecalibrationReport("nothing: all nodes are the same network"))
    return recalibration(setting)


def resolve(named: Recalibration | str | None) -> Recalibration | None:
    """The recalibration of a short name; None for "none".

    Raises
    ------
    ConfigError
        For an unknown name, or a class in place of its instance.

    Examples
    --------
    >>> resolve("repair")
    Repair(final=True, closed_form=False)
    """
    if isinstance(named, type):
        raise ConfigError(f"recalibrate is the class {named.__name__}, expected {named.__name__}()")
    if named is None or (callable(named) and not isinstance(named, str)):
        return named
    if named not in list(SHORT_NAMES):  # a list, because the given value may be unhashable
        raise ConfigError(f"recalibrate is {named!r}, expected one of {', '.join(map(repr, SHORT_NAMES))}")
    return SHORT_NAMES[named]


def resolve_for(
    named: Recalibration | str | None, *, data: bool, default: Recalibration | str = "repair"
) -> Recalibration | None:
    """The recalibration to apply, with or without calibration data; None for nothing.

    Parameters
    ----------
    named : Recalibration, str or None
        As the user gave it. None stands for the default with data, and for nothing without.
    data : bool
        Whether there are calibration data.
    default : Recalibration or str
        What to do with data if `named` is None.

    Raises
    ------
    ConfigError
        For an unknown name, or a class in place of its instance.
    CalibrationError
        When a recalibration was asked for and there are no data.

    Examples
    --------
    >>> resolve_for(None, data=True), resolve_for(None, data=False)
    (Repair(final=True, closed_form=False), None)
    """
    if named is None:
        return resolve(default) if data else None
    found = resolve(named)
    if found is not None and not data:
        raise CalibrationError(f"recalibrate={named!r} needs calibration inputs: pass calibration")
    return found
