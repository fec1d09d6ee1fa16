"""Who judges the candidates, and the clients' moments beside data on the server: options, checked once."""

from __future__ import annotations

from dataclasses import replace

from c2m3_fl.core.spec import PermutationSpec, refuse_rotations
from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.flower.judging.judge import ClientJudge
from c2m3_fl.flower.queries.repair import ClientStatistics
from c2m3_fl.merging.recalibrate.auto import Auto
from c2m3_fl.merging.recalibrate.held_out import split_batches
from c2m3_fl.merging.recalibrate.short_names import Recalibration
from c2m3_fl.network.calibration_set import CalibrationSet

_HELD_OUT = 5  # every fifth labelled example judges, as everywhere else in the package


def resolve_judge(
    judge: ClientJudge | str | None, key: str | None, data: CalibrationSet
) -> tuple[CalibrationSet, ClientJudge | CalibrationSet | None]:
    """The data to fit to, and who judges.

    Parameters
    ----------
    judge : str, ClientJudge or CalibrationSet, optional
        The option of `C2M3`.
    key : str, optional
        Its option `judge_key`.
    data : CalibrationSet
        The server's.

    Raises
    ------
    ConfigError, CalibrationError
        For a judge that does not exist, or needs labels where there are none.
    """
    if judge in (None, "none"):
        if key is not None:
            raise ConfigError(f"judge_key is {key!r}, but judge is {judge!r}: leave one of them out")
        return data, None
    if judge == "labels":
        if key is not None:
            raise ConfigError("judge='labels' compares likelihoods: leave judge_key out")
        if not data.labelled:
            raise CalibrationError("judge='labels' needs calibration data with labels on the server")
        kept, held = split_batches(data.batches, _HELD_OUT)
        if not kept or not held:
            raise CalibrationError(f"judge='labels' holds out one of {_HELD_OUT} examples: got {data.inputs} in all")
        return replace(data, batches=tuple(kept)), replace(data, batches=tuple(held))
    if judge in ("auto", "clients"):
        return data, ClientJudge(key=key)
    if not isinstance(judge, ClientJudge):
        raise ConfigError(f"judge is {judge!r}, expected 'auto', 'clients', 'labels', ClientJudge(...) or None")
    return data, judge if key is None else replace(judge, key=key)


def check_moments(moments: object, data: CalibrationSet, chosen: Recalibration | None, *, decides: bool) -> None:
    """Raise `ConfigError` for the option `moments` where nothing uses them.

    Parameters
    ----------
    moments : ClientStatistics, optional
        The option of `C2M3`.
    data : CalibrationSet
        The server's.
    chosen : Recalibration, optional
        What was asked for by name.
    decides : bool
        Whether evidence decides what is deployed.
    """
    if not isinstance(moments, ClientStatistics | None):
        raise ConfigError(f"moments is {moments!r}, expected ClientStatistics()")
    if moments is None:
        return
    if not data.batches:
        raise ConfigError("moments tell whether the server's calibration data are like the clients': pass calibration")
    if not decides and not isinstance(chosen, Auto):
        raise ConfigError(f'moments serve recalibrate="auto" and None, not {chosen!r}: leave one of them out')


def check_measured(spec: PermutationSpec, data: CalibrationSet) -> None:
    """Raise `ConfigError` where clients' own moments serve nothing: units rotate, or no operator can be measured."""
    refuse_rotations(spec, "clients' own moments")
    if not data.program.operators:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in data.program.skipped.items())
        raise ConfigError(
            "clients are asked for the moments of linear operators and norms (ClientStatistics), and the network has "
            f"none that can be measured{f' ({reasons})' if reasons else ''}: leave ClientStatistics out"
        )
