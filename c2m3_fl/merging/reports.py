"""What recalibration reports: per operator what was corrected, and what could not be."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FitReport:
    """How well an operator could be fitted.

    Attributes
    ----------
    strength : float
        Ridge strength relative to the mean variance of the inputs; infinite where the weights were kept.
    error_before, error : float
        Held-out squared error, relative to the targets' variance, with the weights kept and with the fit.
    """

    strength: float
    error_before: float
    error: float


@dataclass(frozen=True)
class OperatorReport:
    """What recalibration did to one operator.

    Attributes
    ----------
    operator, module : str
        Name of the call in the traced graph, and path of the module that makes it.
    action : str
        What was done: "mean and spread", "spread only: no bias", "running statistics", "refit", …
    offset : float
        Before: root mean square over channels of (mean - target) / target spread.
    spread : float
        Before: median over channels of spread / target spread; below one where averaging shrank it.
    dead : int
        Channels that did not vary and kept their scale.
    fit : FitReport, optional
        How well it could be fitted, where it was.
    """

    operator: str
    module: str
    action: str
    offset: float
    spread: float
    dead: int = 0
    fit: FitReport | None = None


@dataclass(frozen=True)
class Candidate:
    """One of the networks that a guard chose from.

    Attributes
    ----------
    name : str
        Short name.
    accuracy : float, optional
        Share of labelled calibration inputs that it classifies correctly; None without labels.
    agreement : float, optional
        Share of calibration inputs that it classifies as the ensemble of the endpoints does; None for networks
        whose output is not one tensor of scores.
    """

    name: str
    accuracy: float | None
    agreement: float | None


@dataclass(frozen=True)
class Decision:
    """What a guard decided.

    Attributes
    ----------
    chosen : str
        Short name of the candidate.
    reason : str
        Why.
    shift : float, optional
        Distance of the calibration data from the nodes' own, where it is known.
    candidates : tuple of Candidate
        What was compared, the safest first.
    """

    chosen: str
    reason: str
    shift: float | None
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class RecalibrationReport:
    """What recalibration did.

    Attributes
    ----------
    method : str
        Short name of what was done.
    operators : tuple of OperatorReport
        In forward order.
    skipped : tuple of (str, str)
        Parameters that belong to no operator whose channels can be rescaled, each with the reason.
    inputs : int
        Number of calibration inputs.
    seconds : float
        Wall-clock time.
    decision : Decision, optional
        What a guard decided, where there was one.
    """

    method: str
    operators: tuple[OperatorReport, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    inputs: int = 0
    seconds: float = 0.0
    decision: Decision | None = None


@dataclass(frozen=True)
class Recalibrated:
    """A recalibrated state dict, and the report of how it came about."""

    state_dict: dict[str, Tensor]
    report: RecalibrationReport
