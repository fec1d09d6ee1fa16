"""Differential privacy: which combinations are refused, and why."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import currentframe
from typing import TypedDict

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
_TURNED = (
    "{name} bounds how far a client's reply is from the model that was sent, but rotations change how weights are "
    "written (norms are folded, replies are rotated), and with it that distance; leave out rotations=True, or pass a "
    "spec without rotations"
)


class Bounds(TypedDict):
    """Of a setup, what decides whether a bound on one client's change holds: see `check_privacy`."""

    separate: bool
    calibrated: bool
    rotating: bool


def check_privacy(
    strategy: object, *, separate: bool, calibrated: bool, rotating: bool = False, asks: Sequence[str] = ()
) -> None:
    """Raise `ConfigError` for a wrapper for differential privacy whose bound would no longer hold.

    Parameters
    ----------
    strategy : object
        The strategy that is wrapped, or the one that wraps.
    separate : bool
        Whether each reply is aligned by itself.
    calibrated : bool
        Whether the merged model is recalibrated.
    rotating : bool
        Whether replies are folded and rotated.
    asks : sequence of str
        The options for which clients are asked about their data: recalibrate, head, judge.
    """
    for each in chain(strategy):
        if isinstance(each, _WRAPPERS):
            name = type(each).__name__
            if not separate:
                raise ConfigError(_JOINT.format(name=name))
            if rotating:
                raise ConfigError(_TURNED.format(name=name))
            if asks:
                raise ConfigError(_ASKED.format(name=name, what=" and ".join(asks)))
            if calibrated:
                raise ConfigError(_CALIBRATED.format(name=name))


def check_callers(*, separate: bool, calibrated: bool, rotating: bool = False, asks: Sequence[str] = ()) -> None:
    """`check_privacy` for every object whose method is being called: only there does an outer wrapper show."""
    frame = currentframe()
    while frame is not None:
        inside = frame.f_locals.get("self")
        check_privacy(inside, separate=separate, calibrated=calibrated, rotating=rotating, asks=asks)
        frame = frame.f_back
