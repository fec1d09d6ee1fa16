"""Every error that c2m3_fl raises on purpose: catch `C2M3Error` to catch them all.

Each message names the thing, what it was, what was expected and what to do.
"""


class C2M3Error(Exception):
    """Base of all errors raised by this package."""


class SpecError(C2M3Error, ValueError):
    """A permutation spec, or a permutation, contradicts itself or the spec it belongs to."""


class TraceError(C2M3Error, RuntimeError):
    """A network could not be called with the example inputs, or not be exported: its symmetries cannot be derived."""


class ParamsError(C2M3Error, ValueError):
    """A state dict does not fit: missing, extra, reshaped, retyped or non-finite tensors."""


class WeightsError(C2M3Error, ValueError):
    """Averaging weights are negative, not finite, all zero, or of the wrong number."""


class CalibrationError(C2M3Error, ValueError):
    """Calibration data are empty, of the wrong type, or cannot be fed to the network."""


class ConfigError(C2M3Error, ValueError):
    """An option or a run-config value is unknown or out of range."""


class DataError(C2M3Error, RuntimeError):
    """A data set could not be found or downloaded."""


class SimulationError(C2M3Error, RuntimeError):
    """A simulated federation did not finish: a client raised, or Flower's engine did not run."""


class MissingExtraError(C2M3Error, ImportError):
    """A package that only an extra of this one installs is missing; the message names the pip command."""
