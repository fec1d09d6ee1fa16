"""Networks in, network out: alignment, average, recalibration, and scores between networks.

What a page teaches is importable from here; other names may move. `README.md` beside this file describes the methods,
the recalibrations, and how to write one of your own.
"""

from c2m3_fl.merging.align.base import Alignment, Method, Nodes, moved
from c2m3_fl.merging.align.cca import CCA
from c2m3_fl.merging.align.methods import (
    ActivationMatching,
    CycleConsistent,
    GitReBasin,
    Mean,
    MergeMany,
)
from c2m3_fl.merging.evaluate.barrier import Line, Simplex, barrier, pairwise_barriers, simplex
from c2m3_fl.merging.evaluate.landscape import Landscape, landscape
from c2m3_fl.merging.evaluate.scoring import Score
from c2m3_fl.merging.merge import merge
from c2m3_fl.merging.merged import Merge
from c2m3_fl.merging.recalibrate.auto import Auto
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.repair import BatchNormStatistics, Repair, recalibration_report, repair
from c2m3_fl.merging.recalibrate.setting import Setting, prepare
from c2m3_fl.merging.recalibrate.shift import channel_moments
from c2m3_fl.merging.recalibrate.short_names import Recalibration
from c2m3_fl.merging.reports import MergeReport, Recalibrated, RecalibrationReport
from c2m3_fl.merging.widths.maps import WidthMaps

__all__ = [
    "CCA",
    "ActivationMatching",
    "Alignment",
    "Auto",
    "BatchNormStatistics",
    "CycleConsistent",
    "GitReBasin",
    "Landscape",
    "Line",
    "Mean",
    "Merge",
    "MergeMany",
    "MergeReport",
    "Method",
    "Nodes",
    "Recalibrated",
    "Recalibration",
    "RecalibrationReport",
    "Refit",
    "Repair",
    "Score",
    "Setting",
    "Simplex",
    "WidthMaps",
    "barrier",
    "channel_moments",
    "landscape",
    "merge",
    "moved",
    "pairwise_barriers",
    "prepare",
    "recalibration_report",
    "repair",
    "simplex",
]
