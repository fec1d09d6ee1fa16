"""The result of a merge, and its report."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.basis import consensus
from c2m3_fl.core.result import Match
from c2m3_fl.merging.align.base import Alignment, Nodes
from c2m3_fl.merging.reports import MergeReport, RecalibrationReport
from c2m3_fl.merging.widths.maps import WidthMaps


@dataclass(frozen=True, eq=False)
class Merge:
    """A merged network.

    Attributes
    ----------
    state_dict : dict of str to Tensor
        Loads into the model.
    match : Match, optional
        Each node's permutation into the universe; None for methods that have none.
    report : MergeReport
        What was done.
    widths : WidthMaps, optional
        For nodes of different widths: who has which unit. `match` then is of the nodes padded with dead units.
    """

    state_dict: dict[str, Tensor] = field(repr=False)
    match: Match | None = field(repr=False)
    report: MergeReport
    widths: WidthMaps | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return str(self.report)


def merge_report(
    nodes: Nodes, alignment: Alignment, recalibration: RecalibrationReport | None, seconds: float
) -> MergeReport:
    """Report of a merge.

    Parameters
    ----------
    nodes : Nodes
        What was merged.
    alignment : Alignment
        The nodes in one basis.
    recalibration : RecalibrationReport, optional
        What was done to the average.
    seconds : float
        Wall-clock time of everything.
    """
    share = nodes.weights.tolist()
    layers = consensus(nodes.spec, alignment.params, share).layers if len(share) > 1 else {}
    found, moves = alignment.match, alignment.moves
    notes = list(alignment.notes)
    if recalibration is None and not nodes.batches:
        notes.append("nothing was recalibrated: there are no calibration data")
    if recalibration is None and any(name.endswith("running_var") for name in nodes.spec.tensors):
        notes.append(
            "BatchNorm statistics are means over the nodes, wrong for the merged network; recalibrate with data"
        )
    return MergeReport(
        nodes=len(nodes.params),
        basis=nodes.basis,
        weights=tuple(share),
        objectives=None if found is None or not layers else (found.objectives[0], found.objectives[-1]),
        share_moved=None if moves is None else tuple(permutation.share_moved(move) for move in moves),
        layers={name: tuple(row.tolist()) for name, row in layers.items()},
        recalibration=recalibration,
        notes=tuple(notes),
        match_seconds=alignment.seconds,
        seconds=seconds,
    )
