"""Recalibration of an aggregate by the server's data or by clients' moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from logging import WARNING

import torch
from flwr.serverapp import Grid
from flwr.supercore import log

from c2m3_fl.core.permutation import identity
from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError
from c2m3_fl.flower.aligner import with_cpu_fallback
from c2m3_fl.flower.client_repair import own_moments, repair_by_clients
from c2m3_fl.flower.evidence import FAR
from c2m3_fl.flower.rounds import AlignedReplies
from c2m3_fl.flower.setup import Setup
from c2m3_fl.merging.recalibrate.setting import Setting, prepare
from c2m3_fl.merging.recalibrate.shift import OwnMoments, shift, with_own_moments
from c2m3_fl.merging.recalibrate.short_names import Recalibration, recalibrate
from c2m3_fl.merging.reports import Recalibrated
from c2m3_fl.network.moments import Moments


def recalibrate_aggregate(
    setup: Setup,
    recalibration: Recalibration,
    merged: Params,
    aligned: AlignedReplies,
    *,
    plain: Params | None = None,
    grid: Grid | None = None,
    insists: bool = False,
) -> Recalibrated:
    """Recalibrate with the server's data, or with what clients measure where it holds none.

    Parameters
    ----------
    setup : Setup
        Of the strategy.
    recalibration : Recalibration
        What to do.
    merged : mapping of str to Tensor
        The aggregate, in the model's element types; not mutated.
    aligned : AlignedReplies
        What was aggregated.
    plain : mapping of str to Tensor, optional
        The aggregate without alignment, for a guard.
    grid : Grid, optional
        Where clients can be asked.
    insists : bool
        Whether to go on, with a warning, where the data are not of the clients' kind.

    Raises
    ------
    CalibrationError
        When there is nothing to measure with, or the data are not of the clients' kind.
    """
    if setup.statistics is not None:
        if grid is None:
            raise CalibrationError("there is no grid to ask clients for moments: send out a model first")
        nodes, weights = aligned.nodes, aligned.weights
        return repair_by_clients(
            setup.statistics, recalibration, grid, nodes, setup.data, merged, aligned.params, weights
        )
    own = _own(setup, grid, aligned)

    def compute(device: torch.device) -> Recalibrated:
        setting = _prepared(setup, merged, aligned, own, device, plain)
        _check_kind(setting, insists=insists)
        found = recalibrate(recalibration, setting)
        return replace(found, state_dict={name: value.cpu() for name, value in found.state_dict.items()})

    return with_cpu_fallback(compute, setup.device, "recalibration")[0]


def _own(setup: Setup, grid: Grid | None, aligned: AlignedReplies) -> Sequence[OwnMoments]:
    """Each client's moments of its own reply on its own data; empty where they are not known."""
    if setup.moments is None or grid is None:
        return []
    try:
        return own_moments(setup.moments, grid, aligned.nodes, setup.data, aligned.params)
    except CalibrationError as error:
        log(WARNING, "\t> the clients' own moments are not known, so nothing shows a shift: %s", error)
        return []


def _prepared(
    setup: Setup,
    merged: Params,
    aligned: AlignedReplies,
    own: Sequence[OwnMoments],
    device: torch.device,
    plain: Params | None,
) -> Setting:
    setting = prepare(
        setup.model, merged, aligned.params, setup.data, weights=aligned.weights, device=device, plain=plain
    )
    if not own:
        return setting
    here = [{name: _moved(each, device) for name, each in moments.items()} for moments in own]
    return with_own_moments(setting, setup.spec, [identity(setup.spec)] * len(here), here)


def _check_kind(setting: Setting, *, insists: bool) -> None:
    """Refuse calibration inputs of another range or spread than those that the replies' networks know."""
    distance = shift(setting)
    if distance is None or distance <= FAR:
        return
    reason = (
        f"the calibration inputs are not of the clients' kind: some channels are {distance:.1f} spreads (or e-foldings "
        f"of the spread) away from the clients' own, expected at most {FAR:g}; scale them as in training"
    )
    if not insists:
        raise CalibrationError(reason)
    log(WARNING, "\t> %s", reason)


def _moved(moments: Moments, device: torch.device) -> Moments:
    return replace(moments, mean=moments.mean.to(device), deviation=moments.deviation.to(device))
