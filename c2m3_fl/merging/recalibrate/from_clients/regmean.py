"""RegMean (Jin et al., ICLR 2023): the average of linear operators, weighted by the second moments of their inputs.

``W = (Σ wₖ Gₖ)⁻¹ Σ wₖ Gₖ Wₖ`` minimises ``Σ wₖ |Xₖ W - Xₖ Wₖ|²``, with Gₖ the second moments of network k's inputs on
data of its own. All operators are solved at once: each network's inputs are those in the network itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.merging.reports import OperatorReport
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.program import Program
from c2m3_fl.network.rows import from_matrix, weight_matrix

_LIFT = 1e-6  # of the mean diagonal: directions without inputs stay as they are


def shrunk(gram: Tensor, shrink: float) -> Tensor:
    """A matrix whose entries off the diagonal are `shrink` times as large (Jin et al., section 4.2)."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    return shrink * gram + (1 - shrink) * torch.diag_embed(diagonal)


def regression_mean(
    grams: Sequence[Tensor], matrices: Sequence[Tensor], shares: Sequence[float], origin: Tensor
) -> Tensor:
    """The weighted regression mean of matrices, shape (groups, inputs, outputs).

    Directions in which no network has inputs are left as in `origin`; where all matrices equal it, it is returned bit
    for bit.

    Parameters
    ----------
    grams : sequence of Tensor, shape (groups, inputs, inputs)
        Second moments of every network's inputs.
    matrices : sequence of Tensor, shape (groups, inputs, outputs)
        The networks' weights.
    shares : sequence of float
        Their averaging weights, which sum to one.
    origin : Tensor, shape (groups, inputs, outputs)
        The plain average.
    """
    left, right = torch.zeros_like(grams[0]), torch.zeros_like(origin)
    for gram, matrix, share in zip(grams, matrices, shares, strict=True):
        left += share * gram
        right += share * (gram @ (matrix - origin))
    scale = left.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(left.dtype).tiny)[:, None, None]
    lifted = left + _LIFT * scale * torch.eye(left.shape[-1], dtype=left.dtype, device=left.device)
    return origin + torch.cholesky_solve(right, torch.linalg.cholesky(lifted))


def assign_regression_mean(
    program: Program,
    operator: Operator,
    params: dict[str, Tensor],
    endpoints: Sequence[Params],
    grams: Sequence[Tensor],
    shares: Sequence[float],
) -> OperatorReport:
    """Put the regression mean of one operator's weights in place; its bias stays the plain average's.

    Parameters
    ----------
    program : Program
        The traced network.
    operator : Operator
        A linear layer, matrix product or convolution.
    params : dict of str to Tensor
        The plain average; changed in place.
    endpoints : sequence of mappings of str to Tensor
        The aligned networks that answered.
    grams : sequence of Tensor
        Second moments of their inputs, shrunk.
    shares : sequence of float
        Their averaging weights, which sum to one.
    """
    weight = params[operator.weight]
    matrices = [weight_matrix(operator, endpoint[operator.weight].double()) for endpoint in endpoints]
    found = regression_mean(grams, matrices, shares, weight_matrix(operator, weight.double()))
    program.assign(params, operator.weight, from_matrix(operator, found, weight.shape))
    return OperatorReport(operator.name, operator.module, "regression mean", 0.0, 1.0)
