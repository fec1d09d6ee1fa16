"""Recalibration of an aggregate by the server's data or by clients' moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from logging import WARNING

import torch
from flwr.serverapp import Grid
from flwr.supercore import log

from c2m3_fl.core.permutation import identity
from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError
from c2m3_fl.flower.aligning.aligned_replies import AlignedReplies
from c2m3_fl.flower.aligning.out_of_memory import with_cpu_fallback
from c2m3_fl.flower.judging.evidence import FAR, UNLIKE
from c2m3_fl.flower.queries.repair import own_moments, repair_by_clients
from c2m3_fl.flower.setup import Setup
from c2m3_fl.flower.widths.rounds import RoundWidths
from c2m3_fl.merging.recalibrate.from_clients.pool import far_statistics
from c2m3_fl.merging.recalibrate.setting import Setting, prepare
from c2m3_fl.merging.recalibrate.shift import OwnMoments, shift, with_own_moments
from c2m3_fl.merging.recalibrate.short_names import Recalibration, recalibrate
from c2m3_fl.merging.reports import Recalibrated
from c2m3_fl.network.moments import Moments


class ServerSide:
    """What the server can make of one aggregate; what was prepared for one recalibration serves the next.

    Parameters
    ----------
    setup : Setup
        Of the strategy.
    merged : mapping of str to Tensor
        The aggregate, in the model's element types; not mutated.
    aligned : AlignedReplies
        What was aggregated.
    plain : mapping of str to Tensor, optional
        The aggregate without alignment, for a guard.
    grid : Grid, optional
        Where clients can be asked.
    widths : RoundWidths, optional
        Of the replies, where they may differ.
    equally : bool
        Whether the strategy ignores weights: then it may leave out replies that do not fit the others, and so does a
        recalibration.

    Attributes
    ----------
    unlike : str
        What shows that the calibration inputs are unlike the clients' data, and yet usable; "" otherwise.
    """

    def __init__(
        self,
        setup: Setup,
        merged: Params,
        aligned: AlignedReplies,
        *,
        plain: Params | None = None,
        grid: Grid | None = None,
        widths: RoundWidths | None = None,
        equally: bool = False,
    ) -> None:
        self.setup, self.merged, self.plain, self.grid = setup, merged, plain, grid
        self._replies, self.equally = aligned, equally
        self.widths = widths
        self.unlike = ""
        self._settings: dict[torch.device, Setting] = {}

    @cached_property
    def aligned(self) -> AlignedReplies:
        """The replies that count: statistics fit the others', and weights where the strategy ignores examples."""
        return self._replies.only(_sound(self.setup, self._replies, equally=self.equally))

    def moved(self) -> bool:
        """Whether units of a reply that counts moved."""
        return any(self._replies.shares) and any(self.aligned.shares)

    def recalibrate(self, recalibration: Recalibration, *, insists: bool = False) -> Recalibrated:
        """Recalibrate with the server's data, or with what clients measure where it holds none.

        Parameters
        ----------
        recalibration : Recalibration
            What to do.
        insists : bool
            Whether to go on, with a warning, where the data are not of the clients' kind.

        Raises
        ------
        CalibrationError
            When there is nothing to measure with, or the data are not of the clients' kind.
        """
        setup, aligned = self.setup, self.aligned
        if setup.statistics is not None:
            if self.grid is None:
                raise CalibrationError("there is no grid to ask clients for moments: send out a model first")
            where = setup.statistics, recalibration, self.grid, aligned.nodes, setup.data
            return repair_by_clients(*where, self.merged, aligned.params, aligned.weights, equally=self.equally)

        def compute(device: torch.device) -> Recalibrated:
            setting = self._setting(device)
            self.unlike = _check_kind(setting, insists=insists)
            found = recalibrate(recalibration, setting)
            return replace(found, state_dict={name: value.cpu() for name, value in found.state_dict.items()})

        return with_cpu_fallback(compute, setup.device, "recalibration")[0]

    @cached_property
    def _own(self) -> Mapping[int, OwnMoments]:
        """By node, its moments of its own reply on its own data; empty where those of most are not known."""
        setup, aligned = self.setup, self.aligned
        if setup.moments is None or self.grid is None:
            return {}
        try:
            return own_moments(setup.moments, self.grid, aligned.nodes, setup.data, aligned.params)
        except CalibrationError as error:
            log(WARNING, "\t> the clients' own moments are not known, so nothing shows a shift: %s", error)
            return {}

    def _setting(self, device: torch.device) -> Setting:
        if device not in self._settings:
            self._settings[device] = self._prepared(device)
        return self._settings[device]

    def _prepared(self, device: torch.device) -> Setting:
        setup, aligned = self.setup, self.aligned
        weights = aligned.weights
        setting = prepare(
            setup.model,
            self.merged,
            aligned.params,
            setup.data,
            weights=weights,
            device=device,
            plain=self.plain,
            # the replies are in order of their content already, so that nothing is digested again
            order=sorted(range(len(weights)), key=lambda index: -weights[index]),
        )
        if self.widths is not None and any(aligned.narrow):
            return self.widths.at_own_widths(setting, aligned)
        if not self._own:
            return setting
        own = {
            node: {name: _moved(each, device) for name, each in moments.items()} for node, moments in self._own.items()
        }
        here = [own.get(node) for node in aligned.nodes]
        return with_own_moments(setting, setup.spec, [identity(setup.spec)] * len(here), here)


def _sound(setup: Setup, aligned: AlignedReplies, *, equally: bool) -> list[bool]:
    """Which replies count; all of them where no two do."""
    kept = list(aligned.fits) if equally else [True] * len(aligned.params)
    if setup.calibrated and not any(aligned.narrow):  # the statistics of others are padded
        far = far_statistics(setup.data.program, aligned.params)
        kept = [fits and index not in far for index, fits in enumerate(kept)]
    return kept if sum(kept) > 1 else [True] * len(kept)


def _check_kind(setting: Setting, *, insists: bool) -> str:
    """Refuse calibration inputs of another range or spread than those that the replies' networks know.

    Returns what is to be said of inputs that are not refused, though they are unlike the clients'; "" otherwise.
    """
    distance = shift(setting)
    if distance is None or distance <= UNLIKE:
        return ""
    away = (
        f"some channels are {distance:.1f} spreads (or e-foldings of the spread) away from the clients' own, "
        f"expected at most {UNLIKE:g}"
    )
    if distance <= FAR:
        return f"the calibration inputs are unlike the clients' data: {away}; what is fitted to them may lose accuracy"
    reason = f"the calibration inputs are not of the clients' kind: {away}; scale them as in training"
    if not insists:
        raise CalibrationError(reason)
    return reason


def _moved(moments: Moments, device: torch.device) -> Moments:
    return replace(moments, mean=moments.mean.to(device), deviation=moments.deviation.to(device))


class UnsupportedError(Exception):
    """A candidate that the evidence does not support."""


def unless_repaired(make: Callable[[], Recalibrated]) -> Recalibrated:
    """The guard's choice, unless it is REPAIR for want of anything better: nothing moved, so nothing has to be."""
    found = make()
    decision = found.report.decision
    if decision is not None and decision.chosen == "repair":
        raise UnsupportedError(f"no unit moved, and REPAIR alone is left: {decision.reason}")
    return found
