"""An operator and the BatchNorm behind it, in evaluation mode, as one linear operator."""

from __future__ import annotations

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.rows import weight_matrix

_EPSILON = 7  # place of that argument of aten.batch_norm


def effective(operator: Operator, norm: Operator | None, params: Params) -> tuple[Tensor, Tensor]:
    """Matrices (groups, inputs, outputs) and offsets (groups, outputs) of an operator and the BatchNorm behind it."""
    matrix = weight_matrix(operator, params[operator.weight].double())
    shape = (len(matrix), matrix.shape[2])
    offset = params[operator.bias].double().reshape(shape) if operator.bias else matrix.new_zeros(shape)
    if norm is None:
        return matrix, offset
    gain, mean, bias = (each.reshape(shape) for each in affine(norm, params))
    return matrix * gain[:, None, :], (offset - mean) * gain + bias


def affine(norm: Operator, params: Params) -> tuple[Tensor, Tensor, Tensor]:
    """Gain, mean and bias of a BatchNorm in evaluation mode: ``(x - mean) * gain + bias``."""
    mean = params[norm.mean].double()
    weight = params[norm.weight].double() if norm.weight else torch.ones_like(mean)
    bias = params[norm.bias].double() if norm.bias else torch.zeros_like(mean)
    return weight / spread_of(norm, params), mean, bias


def spread_of(norm: Operator, params: Params) -> Tensor:
    """What a BatchNorm divides by."""
    return (params[norm.variance].double() + epsilon(norm)).sqrt()


def epsilon(norm: Operator) -> float:
    """What a BatchNorm adds to its variance."""
    return float(str(norm.node.args[_EPSILON]))
