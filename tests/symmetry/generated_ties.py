"""Blocks of a residual stream whose layers share parameters: one object, or one memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A stream and, added to it, layers up and down; `sizes` are those of the groups that a reader expects inside."""

    def __init__(self, width: int, *hidden: int) -> None:
        super().__init__()
        self.sizes = list(hidden)
        self.up = nn.ModuleList(nn.Linear(width, units) for units in hidden)
        self.down = nn.ModuleList(nn.Linear(units, width) for units in hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.stack([down(up(x).tanh()) for up, down in zip(self.up, self.down, strict=True)]).sum(0)


def one_square(width: int) -> Block:
    """Rows and columns of one parameter: the units inside are those of the stream."""
    made = Block(width, width)
    made.down[0].weight, made.sizes = made.up[0].weight, []
    return made


def one_layer_twice(width: int) -> Block:
    made = Block(width, 4, 4)
    made.up[1], made.sizes = made.up[0], [4]
    return made


def one_bias(width: int) -> Block:
    made = Block(width, 4, 4)
    made.up[1].bias, made.sizes = made.up[0].bias, [4]
    return made


def transposed(width: int) -> Block:
    made = Block(width, 4)
    made.down[0].weight.data = made.up[0].weight.data.t()
    return made


def first_rows(width: int) -> Block:
    """Four of seven units are those of the other layer."""
    made = Block(width, 7, 4)
    made.up[1].weight.data, made.sizes = made.up[0].weight.data[:4], [4, 3]
    return made


def every_other_row(width: int) -> Block:
    made = Block(width, 7, 4)
    made.up[1].weight.data, made.sizes = made.up[0].weight.data[::2], [4, 3]
    return made


def last_columns(width: int) -> Block:
    made = Block(width, 7, 4)
    made.down[1].weight.data, made.sizes = made.down[0].weight.data[:, 3:], [4, 3]
    return made


def biases_in_one_memory(width: int) -> Block:
    made = Block(width, 7, 4)
    made.up[1].bias.data, made.sizes = made.up[0].bias.data[2:6], [4, 3]
    return made


def viewed(width: int) -> Block:
    """The same entries under another object."""
    made = Block(width, 4, 4)
    made.up[1].weight.data, made.sizes = made.up[0].weight.data.view(4, width), [4]
    return made


def neighbours(width: int) -> Block:
    """Not tied: windows of one flat memory, as optimisers keep it."""
    made = Block(width, 4, 3)
    memory = torch.randn(7 * width)
    made.up[0].weight.data, made.up[1].weight.data = memory[: 4 * width].view(4, -1), memory[4 * width :].view(3, -1)
    return made


TIES: tuple[Callable[[int], Block], ...] = (
    one_square,
    one_layer_twice,
    one_bias,
    transposed,
    first_rows,
    every_other_row,
    last_columns,
    biases_in_one_memory,
    viewed,
    neighbours,
)
