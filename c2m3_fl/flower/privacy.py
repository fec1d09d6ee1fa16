"""Differential privacy: which combinations are refused, and why."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import currentframe

from flwr.server import strategy as legacy
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.wrapped import chain

_WRAPPERS = (
    legacy.DPFedAvgFixed,  # DPFedAvgAdaptive derives from it
    legacy.DifferentialPrivacyClientSideAdaptiveClipping,
    legacy.DifferentialPrivacyClientSideFixedClipping,
    legacy.DifferentialPrivacyServerSideAdaptiveClipping,
    legacy.DifferentialPrivacyServerSideFixedClipping,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)

_JOINT = (
    "{name} bounds what one client can change, but in a joint match every client's permutation depends on all the "
    "others, so that bound does not hold in either order of the wrappers; pass alignment='separate', which matches "
    "each reply with nothing but the public global model"
)
_CALIBRATED = (
    "{name} bounds what one client can change, but recalibration measures every client's network by itself, outside "
    "that bound; pass calibration=None"
)
_ASKED = (
    "{name} bounds what one client can change, but {what} asks the clients for more about their data, outside that "
    "bound, and the model that it deploys differs from the one that clients are clipped against; leave {what} out"
)


def check_privacy(strategy: object, *, separate: bool, calibrated: bool, asks: Sequence[str] = ()) -> None:
    """Raise `ConfigError` for a wrapper for differential privacy whose bound would no longer hold.

    Parameters
    ----------
    strategy : object
        The strategy that is wrapped, or the one that wraps.
    separate : bool
        Whether each reply is aligned by itself.
    calibrated : bool
        Whether the merged model is recalibrated.
    asks : sequence of str
        The options for which clients are asked about their data: recalibrate, head, judge.
    """
    for each in chain(strategy):
        if isinstance(each, _WRAPPERS):
            name = type(each).__name__
            if not separate:
                raise ConfigError(_JOINT.format(name=name))
            if asks:
                raise ConfigError(_ASKED.format(name=name, what=" and ".join(asks)))
            if calibrated:
                raise ConfigError(_CALIBRATED.format(name=name))


def check_callers(*, separate: bool, calibrated: bool, asks: Sequence[str] = ()) -> None:
    """`check_privacy` for every object whose method is being called: only there does an outer wrapper show."""
    frame = currentframe()
    while frame is not None:
        check_privacy(frame.f_locals.get("self"), separate=separate, calibrated=calibrated, asks=asks)
        frame = frame.f_back
