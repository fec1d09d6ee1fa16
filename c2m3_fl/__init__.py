"""C2M3 for Flower: align the clients' neurons, then average.

The names below are imported on first use, so that the core can be used where Flower is not installed.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# OpenMP reads it when torch loads: threads that spin while they wait made a match twenty times slower on busy cores.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from c2m3_fl.core.match import match
    from c2m3_fl.core.result import Match
    from c2m3_fl.core.spec import Group, PermutationSpec, Segment, TensorSpec
    from c2m3_fl.errors import (
        C2M3Error,
        CalibrationError,
        ConfigError,
        DataError,
        MissingExtraError,
        ParamsError,
        SimulationError,
        SpecError,
        TraceError,
        WeightsError,
    )
    from c2m3_fl.flower.strategy import C2M3
    from c2m3_fl.merging.merge import merge
    from c2m3_fl.merging.merged import Merge
    from c2m3_fl.merging.recalibrate.repair import repair
    from c2m3_fl.symmetry.discover import check_invariance, permutation_spec
    from c2m3_fl.symmetry.folding import find_folding, fold, unfold

_HOME = {
    "C2M3": "c2m3_fl.flower.strategy",
    "C2M3Error": "c2m3_fl.errors",
    "CalibrationError": "c2m3_fl.errors",
    "ConfigError": "c2m3_fl.errors",
    "DataError": "c2m3_fl.errors",
    "Group": "c2m3_fl.core.spec",
    "Match": "c2m3_fl.core.result",
    "Merge": "c2m3_fl.merging.merged",
    "MissingExtraError": "c2m3_fl.errors",
    "ParamsError": "c2m3_fl.errors",
    "PermutationSpec": "c2m3_fl.core.spec",
    "Segment": "c2m3_fl.core.spec",
    "SimulationError": "c2m3_fl.errors",
    "SpecError": "c2m3_fl.errors",
    "TensorSpec": "c2m3_fl.core.spec",
    "TraceError": "c2m3_fl.errors",
    "WeightsError": "c2m3_fl.errors",
    "check_invariance": "c2m3_fl.symmetry.discover",
    "find_folding": "c2m3_fl.symmetry.folding",
    "fold": "c2m3_fl.symmetry.folding",
    "match": "c2m3_fl.core.match",
    "merge": "c2m3_fl.merging.merge",
    "permutation_spec": "c2m3_fl.symmetry.discover",
    "repair": "c2m3_fl.merging.recalibrate.repair",
    "unfold": "c2m3_fl.symmetry.folding",
}

__all__ = [
    "C2M3",
    "C2M3Error",
    "CalibrationError",
    "ConfigError",
    "DataError",
    "Group",
    "Match",
    "Merge",
    "MissingExtraError",
    "ParamsError",
    "PermutationSpec",
    "Segment",
    "SimulationError",
    "SpecError",
    "TensorSpec",
    "TraceError",
    "WeightsError",
    "check_invariance",
    "find_folding",
    "fold",
    "match",
    "merge",
    "permutation_spec",
    "repair",
    "unfold",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  # a module's attributes are of any type
    if name not in _HOME:
        raise AttributeError(f"module 'c2m3_fl' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
