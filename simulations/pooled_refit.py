"""Refit from clients where their data are at hand: the sums of `ClientRefit`, without messages and without Flower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from c2m3_fl.core.spec import Params
from c2m3_fl.merging.recalibrate.correction import rescale
from c2m3_fl.merging.recalibrate.from_clients.fit import fit_operator
from c2m3_fl.merging.recalibrate.from_clients.plan import Role, plan_refit
from c2m3_fl.merging.recalibrate.from_clients.pool import pool_fits, pool_moments
from c2m3_fl.merging.recalibrate.from_clients.sums import Drawing, FitAnswer, Measured, MomentsAnswer, measure
from c2m3_fl.merging.recalibrate.head.fit import STRENGTHS
from c2m3_fl.merging.recalibrate.targets import Target
from c2m3_fl.network.calibration_set import CalibrationSet

Share = tuple[Tensor, Tensor]  # a client's images (n, channels, height, width) and labels (n,)

_ALL = 2**62  # bytes: no operator is too large where nothing is sent
_POSITIONS, _HOLDOUT = 4096, 5  # the defaults of ClientRefit
_MEASURED = 250  # images that are measured at once


def refit(
    model: nn.Module, average: Params, nodes: Sequence[Params], shares: Sequence[Share], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Refit from the clients, as `ClientRefit` does it, where the clients' data are at hand.

    Parameters
    ----------
    model : nn.Module
        The architecture, without norms.
    average : mapping of str to Tensor
        The average; not mutated.
    nodes : sequence of mappings of str to Tensor
        The clients' networks in the basis of the average.
    shares : sequence of Share
        Their data, in the same order.
    weights : sequence of float
        Their averaging weights, which sum to one.
    """
    sets = [CalibrationSet.of(model, in_batches(share)) for share in shares]
    program, params = sets[0].programs[0], dict(average)
    plan = plan_refit(program, params, exchanges=None, width=8, max_bytes=_ALL, first_layer=False)
    with torch.no_grad():
        for (step,) in plan.exchanges:
            operator = program.operators[step.place]
            answers: list[Measured] = [
                measure(
                    data.programs,
                    data.batches,
                    params,
                    own,
                    {step.place: step.role},
                    Drawing(_POSITIONS, _HOLDOUT, seed=index),
                )[operator.name]
                for index, (own, data) in enumerate(zip(nodes, sets, strict=True))
            ]
            fits = [each for each in answers if isinstance(each, FitAnswer)]
            moments = [each for each in answers if isinstance(each, MomentsAnswer)]
            if step.role is Role.FIT:
                fit_operator(program, operator, params, pool_fits(fits, weights), STRENGTHS)
            else:
                wanted = pool_moments([each.own for each in moments if each.own is not None], weights)
                found = pool_moments([each.merged for each in moments], weights)
                rescale(program, operator, params, found, Target(wanted.mean, wanted.std))
    return params


def in_batches(share: Share) -> list[Share]:
    """The same data in batches that are measured at once."""
    return list(zip(*(torch.split(values, _MEASURED) for values in share), strict=True))
