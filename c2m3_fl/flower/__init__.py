"""The adapters to Flower: strategies, records, checkpoints, and a federation inside one process."""

# ruff: noqa: E402  # what is missing is named before anything imports it

from c2m3_fl.extras import require

require(None, "flwr")

from c2m3_fl.flower.judging.judge import ClientJudge
from c2m3_fl.flower.legacy import C2M3 as LegacyC2M3  # noqa: N811  # a class, like its counterpart
from c2m3_fl.flower.queries.head import Head
from c2m3_fl.flower.queries.moments import answer_statistics
from c2m3_fl.flower.queries.refit import ClientRefit, RegMean
from c2m3_fl.flower.queries.repair import ClientStatistics
from c2m3_fl.flower.resuming.resumable import Resumable
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.flower.widths.asking import answer_width, width_of

__all__ = [
    "C2M3",
    "ClientJudge",
    "ClientRefit",
    "ClientStatistics",
    "Head",
    "LegacyC2M3",
    "RegMean",
    "Resumable",
    "SerialGrid",
    "answer_statistics",
    "answer_width",
    "width_of",
]
