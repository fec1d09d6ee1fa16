"""What may follow an average: the recalibrations, and their short names."""

from __future__ import annotations

from typing import Protocol

from c2m3_fl.core.state_dicts import same
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.recalibrate.auto import Auto
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.repair import BatchNormStatistics, Repair
from c2m3_fl.merging.recalibrate.setting import Setting
from c2m3_fl.merging.reports import Recalibrated, RecalibrationReport


class Recalibration(Protocol):
    """Corrects an averaged network with what its aligned endpoints do on calibration data."""

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


def recalibrated(recalibration: Recalibration, setting: Setting) -> Recalibrated:
    """Apply a recalibration; endpoints that are all the same network leave nothing to correct."""
    if all(same(setting.merged, endpoint) for endpoint in setting.endpoints):
        return Recalibrated(dict(setting.merged), RecalibrationReport("nothing: all nodes are the same network"))
    return recalibration(setting)


def resolve(recalibrate: Recalibration | str | None) -> Recalibration | None:
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
    if isinstance(recalibrate, type):
        raise ConfigError(f"recalibrate is the class {recalibrate.__name__}, expected {recalibrate.__name__}()")
    if recalibrate is None or (callable(recalibrate) and not isinstance(recalibrate, str)):
        return recalibrate
    if recalibrate not in list(SHORT_NAMES):  # a list is no key
        raise ConfigError(f"recalibrate is {recalibrate!r}, expected one of {', '.join(map(repr, SHORT_NAMES))}")
    return SHORT_NAMES[recalibrate]
