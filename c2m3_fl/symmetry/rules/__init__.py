"""One rule per ATen operator, one file per family of operators: how the axes of inputs and outputs correspond.

Importing this package registers all rules.
"""

from c2m3_fl.symmetry.rules import (
    contraction,
    elementwise,
    fourier,
    lookup,
    matrix,
    normalisation,
    pooling,
    ranking,
    recurrent,
    reduction,
    reshape,
    scatter,
)

__all__ = [
    "contraction",
    "elementwise",
    "fourier",
    "lookup",
    "matrix",
    "normalisation",
    "pooling",
    "ranking",
    "recurrent",
    "reduction",
    "reshape",
    "scatter",
]
