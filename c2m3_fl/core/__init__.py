"""The mathematics of matching and averaging: tensors, NumPy and SciPy, no modules, no Flower."""

from __future__ import annotations

from c2m3_fl.core import permutation
from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.joining import BatchMatch, join, match_in_batches
from c2m3_fl.core.match import match
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.result import Match, Step
from c2m3_fl.core.spec import Group, PermutationSpec, Pin, Segment, TensorSpec
from c2m3_fl.core.spec_json import from_json, to_json

__all__ = [
    "BatchMatch",
    "Group",
    "Match",
    "Permutation",
    "PermutationSpec",
    "Pin",
    "Segment",
    "Step",
    "TensorSpec",
    "from_json",
    "join",
    "match",
    "match_in_batches",
    "permutation",
    "to_json",
    "weighted_mean",
]
