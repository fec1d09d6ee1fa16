"""A learned table that pairs of places look up keeps its order, in every block of a deep network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.network.calibration import as_inputs
from c2m3_fl.symmetry.discover import derive, permutation_spec
from tests.symmetry.families import noise

_SIDE = 4


def _offsets() -> Tensor:
    """Number of the offset (|rows|, |columns|) of every pair of places in a grid, shape (16, 16)."""
    row, column = torch.arange(_SIDE).repeat_interleave(_SIDE), torch.arange(_SIDE).repeat(_SIDE)
    return (row[:, None] - row).abs() * _SIDE + (column[:, None] - column).abs()


class TableAttention(nn.Module):
    """Attention over a grid with a bias per head and offset, and values wider than queries and keys."""

    def __init__(self, width: int, heads: int = 3, key: int = 4, value: int = 6) -> None:
        super().__init__()
        self.heads, self.sizes = heads, [key, key, value]
        self.qkv, self.norm = nn.Linear(width, heads * sum(self.sizes), bias=False), nn.BatchNorm1d(width)
        self.out = nn.Linear(heads * value, width, bias=False)
        self.bias = nn.Parameter(torch.randn(heads, _SIDE**2))
        self.register_buffer("offset", _offsets())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).split(self.sizes, dim=-1)
        scores = (q @ k.mT / self.sizes[0] ** 0.5 + self.bias[:, self.offset]).softmax(-1)
        out = self.out((scores @ v).transpose(1, 2).flatten(2))
        return self.norm(out.flatten(0, 1)).view_as(x)


class TableNet(nn.Module):
    def __init__(self, blocks: int, width: int = 12) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(TableAttention(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_offsets_keep_their_order_in_every_block(blocks: int) -> None:
    spec, *_ = derive(TableNet(blocks), as_inputs(noise(2, _SIDE**2, 5)))
    heads = {f"blocks.{block}.qkv{rest}" for block in range(blocks) for rest in (".blocks", "", "#2")}
    assert set(spec.groups) == {"stem", *heads}  # the stream; per block the heads, their keys and their values
    assert all(spec.tensors[f"blocks.{block}.bias"].axes[1] == () for block in range(blocks))


def test_coordinates_that_a_layer_reads_stay_in_order() -> None:
    """A table of coordinates makes units that no parameter computes: the columns that read it are told apart by it."""

    class Offsets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = nn.Linear(2, 8), nn.Linear(8, 4), nn.Linear(4, 3)
            rows, columns = torch.meshgrid(torch.linspace(-1, 1, 3), torch.linspace(-2, 2, 5), indexing="ij")
            self.register_buffer("coordinates", torch.stack([rows, columns], -1).flatten(0, 1))

        def forward(self, x: Tensor) -> Tensor:
            bias = self.b(self.a(self.coordinates).relu())
            return self.o((x[:, None] + bias).relu().mean(1))

    network = Offsets()
    found = permutation_spec(network, torch.randn(3, 4))
    assert {name: group.size for name, group in found.groups.items()} == {"a": 8}
    assert {pin.tensor for pin in found.pins if pin.reason.startswith("buffer with content")} >= {"coordinates"}
