"""One rule per ATen operator, one file per family of operators: how the axes of inputs and outputs correspond.

Importing this package registers all rules.
"""

from c2m3_fl.symmetry.rules import contraction, elementwise, normalisation, pooling, recurrent, reduction, reshape

__all__ = ["contraction", "elementwise", "normalisation", "pooling", "recurrent", "reduction", "reshape"]
