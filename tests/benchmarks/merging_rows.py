"""What the tables of merges share: a row, the recalibrations, and the nodes merged by C2M3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.merging.merge import Merge, merge
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.repair import BatchNormStatistics, Repair
from c2m3_fl.merging.recalibrate.setting import Setting, prepare
from c2m3_fl.merging.recalibrate.shift import channel_moments, with_own_moments
from c2m3_fl.merging.recalibrate.short_names import Recalibration
from c2m3_fl.network.moments import Moments
from tests.benchmarks.merging_cases import Case, Trained

RECALIBRATIONS: dict[str, Recalibration] = {
    "+ BatchNorm": BatchNormStatistics(),
    "+ REPAIR": Repair(),
    "+ REPAIR, closed form": Repair(closed_form=True),
    "+ last layer refit": Refit(final_only=True, scores=True),
    "+ refit": Refit(scores=True),
}


@dataclass(frozen=True)
class Row:
    """One measurement."""

    case: str
    seed: int
    column: str
    accuracy: float
    seconds: float
    note: str = ""


def own_moments(case: Case, found: Trained) -> list[dict[str, Moments]]:
    """What every node sends: the moments of its channels on (500 of) the images it was trained on."""
    clients = range(len(found.nodes))
    rows = [found.data.training_share(index).inputs for index in clients]
    data = [torch.cat(rows)[:500] if case.whole else rows[index][:500] for index in clients]
    return [channel_moments(found.model, node, [own]) for node, own in zip(found.nodes, data, strict=True)]


def merged_setting(
    found: Trained, spec: PermutationSpec, moments: list[dict[str, Moments]]
) -> tuple[Merge, Callable[[list[Tensor]], Setting]]:
    """The nodes merged by C2M3, and what makes a setting of recalibration from that for any calibration data."""
    done = merge(found.model, found.nodes, recalibrate="none", spec=spec, weights=found.weights)
    assert done.match is not None
    moves = [done.match.between(done.report.basis, index) for index in range(len(found.nodes))]
    aligned = [permutation.apply(spec, move, node) for move, node in zip(moves, found.nodes, strict=True)]

    def setting(calibration: list[Tensor]) -> Setting:
        plain = prepare(found.model, done.state_dict, aligned, calibration, weights=found.weights)
        return with_own_moments(plain, spec, moves, moments)

    return done, setting
