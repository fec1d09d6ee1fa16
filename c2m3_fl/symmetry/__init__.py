"""Which units of a network may be permuted: derived from its graph, checked on numbers.

`permutation_spec` derives a spec; `check_invariance` and `require_invariance` check one. A rule for a custom operator
is a function of a `Call` and of `Labels`, registered by `rule`.
"""

from c2m3_fl.symmetry.discover import check_invariance, permutation_spec, require_invariance
from c2m3_fl.symmetry.folding import find_folding, fold, unfold
from c2m3_fl.symmetry.labels import Labels
from c2m3_fl.symmetry.rules.registry import Call, rule

__all__ = [
    "Call",
    "Labels",
    "check_invariance",
    "find_folding",
    "fold",
    "permutation_spec",
    "require_invariance",
    "rule",
    "unfold",
]
