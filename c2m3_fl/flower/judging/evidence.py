"""What supports a recalibration: the decision of a round, and calibration data on which nothing can be measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from functools import partial
from logging import WARNING

import torch
from flwr.supercore import log
from torch import Tensor

from c2m3_fl.errors import CalibrationError, TraceError
from c2m3_fl.merging.recalibrate.auto import LIMIT
from c2m3_fl.network.calibration import Batch
from c2m3_fl.network.calibration_set import CalibrationSet

# Shift beyond which calibration inputs are not of the clients' kind at all, in standard deviations of a channel or
# logarithms of the ratio of spreads. Four clients' MLPs on digits, wine and breast cancer, IID and Dirichlet .1, seeds
# 10 and 11, which no table shows: held-out inputs at most .22, with noise of their own spread .60, one class of them
# 1.03, x2 and /2 .93, noise instead of inputs 1.97; inputs x16 and /16 at least 2.53, x255 and /255 at least 5.3.
FAR = 2.0
# Shift beyond which the log says that calibration inputs are unlike the clients': the largest at which `Auto` refits.
# No lower limit than FAR is refused, for no shift between the two tells loss from gain: see the table on the page.
UNLIKE = LIMIT
# Effective number of calibration inputs below which nothing is recalibrated with them. Four clients' networks on digits
# with BatchNorm and without, four draws each: of 2 to 5 inputs REPAIR loses accuracy in 22 of 32 cases, of 5 up to .33,
# of 6 and 8 in 6 of 16, up to .09.
FEW = 5.0


class Means(Enum):
    """How the server recalibrates the aggregate of a round."""

    ASKED = "as asked"
    LABELS = "the best by labels of the calibration data"
    JUDGED = "what the clients judge best"
    MOMENTS = "as the clients' moments allow"
    REPAIR = "REPAIR, after units moved"
    NOTHING = "no recalibration; the aggregate is deployed"


def choose_means(
    *, asked: bool = False, decides: bool = True, data: bool, labels: bool, judge: bool, moments: bool, moved: bool
) -> Means:
    """The strongest means that the evidence of a round supports; the rules in order, the first one that holds.

    Parameters
    ----------
    asked : bool
        Whether a recalibration was asked for by name.
    decides : bool
        Whether evidence decides; otherwise only what was asked for is done.
    data : bool
        Whether there is anything to recalibrate with: inputs on the server, or clients that measure.
    labels : bool
        Whether the server's inputs have labels.
    judge : bool
        Whether clients judge candidates in this round.
    moments : bool
        Whether the clients' own channel moments are asked for.
    moved : bool
        Whether units moved in this round: only then did aligning, and so averaging, change the spread of channels.
    """
    rules = (
        (not data, Means.NOTHING),
        (asked, Means.ASKED),
        (not decides, Means.NOTHING),
        (labels, Means.LABELS),
        (judge, Means.JUDGED),
        (moments, Means.MOMENTS),
        (moved, Means.REPAIR),
    )
    return next((means for holds, means in rules if holds), Means.NOTHING)


def usable(data: CalibrationSet, *, asked: bool) -> CalibrationSet:
    """The data, without batches that nothing can be measured on, which is logged.

    Parameters
    ----------
    data : CalibrationSet
        The server's.
    asked : bool
        Whether a recalibration was asked for by name.

    Raises
    ------
    CalibrationError
        For such batches, where a recalibration was asked for.
    """
    reason = _unusable(data.batches)
    if reason is None:
        return data
    if asked:
        raise CalibrationError(f"{reason}: pass more, and more varied, inputs as calibration, or recalibrate='none'")
    log(WARNING, "%s: nothing is recalibrated with them", reason)
    return CalibrationSet(data.model, data.example_inputs)


def with_usable_labels(data: CalibrationSet) -> CalibrationSet:
    """The data, without labels that cannot be class indices of the network's outputs, which is logged.

    Parameters
    ----------
    data : CalibrationSet
        The server's.
    """
    reason = _foreign_labels(data) if data.labelled else None
    if reason is None:
        return data
    log(WARNING, "%s: they decide nothing", reason)
    return replace(data, batches=tuple(replace(batch, labels=None) for batch in data.batches))


def _foreign_labels(data: CalibrationSet) -> str | None:
    """Why labels say nothing about a network's outputs; None where they do, or it cannot be traced."""
    try:
        outputs = data.program.graph.output_node().all_input_nodes
    except TraceError:
        return None
    shapes = [tuple(node.meta["val"].shape) for node in outputs]
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][1] < 2:
        return f"the calibration data have labels, and the network's outputs of shapes {shapes} are no class scores"
    labels = torch.cat([batch.labels for batch in data.batches if batch.labels is not None])
    if 0 <= int(labels.min()) <= int(labels.max()) < shapes[0][1]:
        return None
    return (
        f"the calibration data have labels from {int(labels.min())} to {int(labels.max())}, expected class indices "
        f"from 0 to {shapes[0][1] - 1}: the network gives {shapes[0][1]} scores"
    )


def _unusable(batches: Sequence[Batch]) -> str | None:
    """Why nothing can be measured on calibration inputs: there is one only, or all are the same; None for usable ones.

    No batches at all are usable: nothing is to be measured on them.
    """
    if not batches:
        return None
    count = sum(len(batch.inputs[0]) for batch in batches)
    if count < 2:
        return f"the calibration data are {count} input, which shows no spread of any channel"
    spread = _spread_over(batches)
    if not spread:
        return f"all {count} calibration inputs are the same, which shows no spread of any channel"
    if spread < FEW:
        return (
            f"the spread of the {count} calibration inputs is that of {spread:.1f}, expected at least {FEW:g}: "
            "they are few, or all but few are the same"
        )
    return None


def _spread_over(batches: Sequence[Batch]) -> float:
    """Over how many inputs their variance is spread: Kish's effective number of the squared distances from the mean.

    Zero where all are the same. The largest of all tensors of inputs; without bound where those of one tensor differ in
    shape.
    """
    found = []
    for place, example in enumerate(batches[0].inputs):
        values = [batch.inputs[place] for batch in batches]
        if any(value.shape[1:] != example.shape[1:] for value in values):
            return math.inf
        # from the first one, so that inputs which are the same have no distance at all; squares must not overflow
        first = example[:1].double()
        largest = max(float((value.double() - first).abs().max()) if value.numel() else 0.0 for value in values)
        if not largest:
            found.append(0.0)
            continue
        scaled = partial(_apart, first, largest)
        mean = sum(scaled(value).sum(0) for value in values) / sum(map(len, values))
        squares = torch.cat([(scaled(value) - mean).square().sum(1) for value in values])
        found.append(float(squares.sum().square() / squares.square().sum()))
    return max(found)


def _apart(origin: Tensor, scale: float, values: Tensor) -> Tensor:
    """Rows of distances from an origin; one batch at a time, because they take double precision."""
    return ((values.double() - origin) / scale).flatten(1)
