"""Terms that one group moves, with fewer columns: the agreement knows columns that nothing permutes by products alone.

Two nodes' parts of such a term, an embedding of a large vocabulary for instance, agree by inner products of their
rows, in whatever order these are. So all nodes' rows may be replaced by others that have the same inner products, and
the rows of a Cholesky factor of their Gram matrix have only as many columns as the nodes have units. Nothing that a
search looks at changes but by rounding, and every pass costs less time and memory.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from c2m3_fl.core.terms import Term

_FEWER = 4  # times fewer columns, or the products of a few passes are not worth the factor
_NODES = 32  # at most: the Gram matrix grows with their square, what a pass saves with their number
_LIFT = 1e-5  # of every row's square, so that rows that depend on each other have a factor


def condensed(term: Term) -> Term:
    """The term, or one with the same inner products of different rows and at least `_FEWER` times fewer columns.

    The square of every row is larger by `_LIFT`: only products of different nodes count in the agreement.

    Parameters
    ----------
    term : Term
        All nodes' part; not mutated.
    """
    count, units, *columns = term.value.shape
    rows = count * units
    if len(columns) != 1 or not 1 < count <= _NODES or columns[0] < _FEWER * rows:
        return term
    gram = term.value.new_zeros(count, units, count, units)
    for one, own in enumerate(term.value):
        for other in range(one + 1):
            gram[one, :, other] = own @ term.value[other].T
    lower = gram.reshape(rows, rows).double()
    norms = lower.diagonal().clamp_min(0).sqrt()
    unit = norms.where(norms > 0, 1.0)
    lower /= unit[:, None] * unit
    lower.diagonal().add_(_LIFT)
    factor, failed = torch.linalg.cholesky_ex(lower)
    if int(failed) or not bool(factor.isfinite().all()):
        return term
    value = (factor * norms[:, None]).to(term.value.dtype)
    return replace(term, value=value.reshape(count, units, rows))
