"""Which combinations with differential privacy are refused, and why."""

from __future__ import annotations

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
    "{name} bounds what one client can change, but repair measures every client's network by itself, outside that "
    "bound; pass calibration=None"
)


def check_privacy(strategy: object, *, separate: bool, calibrated: bool) -> None:
    """Raise `ConfigError` for a wrapper for differential privacy whose bound would no longer hold.

    Parameters
    ----------
    strategy : object
        The strategy that is wrapped, or the one that wraps.
    separate : bool
        Whether each reply is aligned by itself.
    calibrated : bool
        Whether the merged model is recalibrated.
    """
    for each in chain(strategy):
        if isinstance(each, _WRAPPERS):
            name = type(each).__name__
            if not separate:
                raise ConfigError(_JOINT.format(name=name))
            if calibrated:
                raise ConfigError(_CALIBRATED.format(name=name))
