"""Rows that a linear operator multiplies with its weight: rows of its input, or patches under a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from c2m3_fl.network.operators import Kind, Operator


def sample_positions(operator: Operator, output: Tensor, count: int, seed: int) -> Tensor:
    """Up to `count` distinct positions of an operator's output, the same for outputs of the same shape.

    A position is a row-major flat index over all axes except that of the channels. If there are at most `count`
    positions, all are returned, in order.

    Parameters
    ----------
    operator : Operator
        One of the network's operators.
    output : Tensor
        Its output.
    count : int
        Largest number of positions.
    seed : int
        Seed of the draw.
    """
    channels = output.shape[operator.layout.channel]
    total = output.numel() // channels
    if total <= count:
        return torch.arange(total, device=output.device)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:count].sort().values.to(output.device)


def output_rows(operator: Operator, output: Tensor, positions: Tensor) -> Tensor:
    """Outputs at the positions, shape (positions, channels).

    Parameters
    ----------
    operator : Operator
        One of the network's operators.
    output : Tensor
        Its output.
    positions : Tensor
        From `sample_positions`.
    """
    channels_last = output.movedim(operator.layout.channel, -1)
    place = _unravel(positions, channels_last.shape[:-1])
    return channels_last[place]


def input_rows(
    operator: Operator, source: Tensor, weight: Tensor, output_shape: Sequence[int], positions: Tensor
) -> Tensor:
    """The rows that the weight multiplies at the positions, shape (groups, positions, inputs per group).

    Parameters
    ----------
    operator : Operator
        A linear layer, matrix product or convolution.
    source, weight : Tensor
        Its input and its weight.
    output_shape : sequence of int
        Shape of its output.
    positions : Tensor
        From `sample_positions`.
    """
    if operator.kind is not Kind.CONVOLUTION:
        return source.reshape(-1, source.shape[-1])[positions][None]
    spatial = operator.layout.spatial
    if source.ndim == spatial + 1:  # an image without a batch axis
        source, output_shape = source[None], (1, *output_shape)
    kernel = weight.shape[2:]
    window = operator.window(kernel)
    padded = nn.functional.pad(source, [side for pair in reversed(window.padding) for side in pair])
    batch, *corner = _unravel(positions, (output_shape[0], *output_shape[2:]))
    index: list[Tensor] = [batch.reshape(-1, *(1,) * spatial)]
    for axis, size in enumerate(kernel):
        reach = torch.arange(size, device=source.device) * window.dilation[axis]
        shape = [len(positions), *(1,) * spatial]
        shape[axis + 1] = size
        index.append((corner[axis][:, None] * window.stride[axis] + reach).reshape(shape))
    found = padded.movedim(1, -1)[tuple(index)]  # positions, kernel..., channels
    found = found.movedim(-1, 1)  # every size is named: there may be no position
    return found.reshape(len(positions), operator.groups, found.shape[1:].numel() // operator.groups).movedim(1, 0)


def weight_matrix(operator: Operator, weight: Tensor) -> Tensor:
    """The weight as matrices of shape (groups, inputs per group, channels per group): outputs = rows @ matrix."""
    if operator.kind is Kind.PRODUCT:
        return weight[None]
    return weight.reshape(operator.groups, weight.shape[0] // operator.groups, -1).movedim(1, 2)


def from_matrix(operator: Operator, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `weight_matrix`.

    Parameters
    ----------
    operator : Operator
        One of the network's operators.
    matrix : Tensor, shape (groups, inputs per group, channels per group)
        Matrices.
    shape : torch.Size
        Shape of the weight.
    """
    return matrix[0] if operator.kind is Kind.PRODUCT else matrix.movedim(1, 2).reshape(shape)


def input_of(positions: Tensor, shape: Sequence[int], count: int) -> Tensor:
    """Index, among `count` network inputs, of the input that each position of an output belongs to.

    Parameters
    ----------
    positions : Tensor
        From `sample_positions`.
    shape : sequence of int
        Shape of the output, without channels.
    count : int
        Number of network inputs in the batch.
    """
    place = _unravel(positions, shape)
    for axis in range(len(shape)):
        if shape[axis] == count:
            return place[axis]
    return place[0] // max(1, shape[0] // count)  # windows of one image are consecutive


def _unravel(positions: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(torch.unravel_index(positions, tuple(shape)))
