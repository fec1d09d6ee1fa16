"""Networks of any width; and a network's copies with other widths and the same function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.merging.widths.injections import carry
from tests.merging.networks import ChannelNorm, Residual


class WideResidual(Residual):
    """The residual network of `tests.merging.networks` in multiples of its width."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int) -> None:
        nn.Module.__init__(self)
        first, second = 2 * width, 4 * width
        self.stem = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.norm = norm(first)
        self.conv1 = nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False)
        self.norm1 = norm(second)
        self.conv2 = nn.Conv2d(second, second, 3, padding=1, bias=False)
        self.norm2 = norm(second)
        self.short = nn.Conv2d(first, second, 1, stride=2)
        self.head = nn.Linear(second, 5)


class WideAttention(nn.Module):
    """Attention over rows; `heads` heads of four units each, unless another size is given."""

    def __init__(self, heads: int, size: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, heads * size)
        self.attention = nn.MultiheadAttention(heads * size, heads, batch_first=True)
        self.head = nn.Linear(heads * size, 5)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.embed(images.flatten(1, 2))
        rows = rows + self.attention(rows, rows, rows, need_weights=False)[0]
        logits: Tensor = self.head(rows.mean(1))
        return logits


class WideLstm(nn.Module):
    """An LSTM over rows, whose last step is classified."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 2 * width, batch_first=True)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, images: Tensor) -> Tensor:
        steps, _ = self.lstm(images.mean(1))
        logits: Tensor = self.head(steps[:, -1])
        return logits


class Dense(nn.Module):
    """Layers that read the outputs of several others, and the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4 * width, 3, padding=1)
        self.second = nn.Conv2d(4 * width + 3, 2 * width, 3, padding=1)
        self.norm = nn.BatchNorm2d(6 * width + 3)
        self.head = nn.Linear(6 * width + 3, 5)

    def forward(self, images: Tensor) -> Tensor:
        first = torch.relu(self.first(images))
        second = torch.relu(self.second(torch.cat([first, images], 1)))
        logits: Tensor = self.head(torch.relu(self.norm(torch.cat([first, second, images], 1))).mean((2, 3)))
        return logits


class Fused(nn.Module):
    """A gate and a branch whose weights are the two halves of one matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(192, 4 * width)
        self.both = nn.Parameter(torch.randn(6 * width, 4 * width))
        self.head = nn.Linear(3 * width, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.enter(images.flatten(1)))
        gate, branch = (nn.functional.linear(hidden, half) for half in self.both.chunk(2))
        logits: Tensor = self.head(torch.relu(branch) * torch.sigmoid(gate))
        return logits


class Tied(nn.Module):
    """The rows of one matrix are embeddings, and class scores are products with them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.layer = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.linear(torch.relu(self.layer(self.embedding(tokens).mean(1))), self.embedding.weight)


def mlp(width: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    first, second = 4 * width, 3 * width
    layers = (nn.Linear(192, first), activation(), nn.Linear(first, second), activation(), nn.Linear(second, 5))
    return nn.Sequential(nn.Flatten(), *layers)


def transposed(width: int) -> nn.Module:
    """Images in, images out: a transposed convolution and a norm over every channel."""
    layers = (
        nn.Conv2d(3, 4 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4 * width, 6 * width, 2, 2),
    )
    return nn.Sequential(*layers, nn.InstanceNorm2d(6 * width, affine=True), nn.ReLU(), nn.Conv2d(6 * width, 3, 1))


def grouped(width: int) -> nn.Module:
    """A depthwise and a grouped convolution, and a flatten."""
    first, second = 6 * width, 8 * width
    return nn.Sequential(
        *(nn.Conv2d(3, first, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(first, first, 3, groups=first)),
        *(nn.ReLU(), nn.Conv2d(first, second, 3, groups=2, padding=1), nn.ReLU(), nn.Flatten()),
        nn.Linear(4 * second, 5),
    )


WIDTHS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": mlp,
    "grouped": grouped,
    "batch norm": lambda width: WideResidual(nn.BatchNorm2d, width),
    "layer norm": lambda width: WideResidual(ChannelNorm, width),
    "group norm": lambda width: WideResidual(lambda channels: nn.GroupNorm(2, channels), width),
    "attention": WideAttention,
    "lstm": WideLstm,
    "dense": Dense,
    "transposed": transposed,
    "fused": Fused,
}


def without_units(spec: PermutationSpec, narrow: PermutationSpec, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network restricted to the first units of every group, or of every kept block."""
    units: dict[str, Tensor] = {}
    for name in sorted(spec.groups, key=lambda name: spec.groups[name].parent is not None):
        group = spec.groups[name]
        if group.parent is None:
            units[name] = torch.arange(narrow.groups[name].size)
        else:
            block, room = (each.groups[name].size // each.groups[group.parent].size for each in (spec, narrow))
            units[name] = (units[group.parent][:, None] * block + torch.arange(room)).reshape(-1)
    return carry(spec, narrow, units, params)


def split_in_two(
    spec: PermutationSpec, wide: PermutationSpec, params: dict[str, Tensor], reads: dict[str, int]
) -> dict[str, Tensor]:
    """A network of twice the width that computes the same: each unit twice, each copy read by half the weights."""
    units: dict[str, Tensor] = {}
    for name, group in spec.groups.items():
        blocks = 1 if group.parent is None else spec.groups[group.parent].size
        wide_blocks = 1 if group.parent is None else wide.groups[group.parent].size
        own = torch.arange(group.size).reshape(blocks, -1)
        units[name] = own.repeat_interleave(wide.groups[name].size // group.size // (wide_blocks // blocks), 1)
        units[name] = units[name].repeat_interleave(wide_blocks // blocks, 0).reshape(-1)
    found = carry(spec, wide, units, params)
    for name, axis in reads.items():
        tensor = wide.tensors[name]
        if tensor.diagonal > 1:
            found[name] = found[name] / 2
            continue
        for segment in tensor.axes[axis]:
            found[name].movedim(axis, 0)[torch.from_numpy(segment.positions)] /= 2
    return found
