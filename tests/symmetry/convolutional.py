"""Convolutional and other networks that exercise one idea each, small."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of every pixel."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Residual(nn.Module):
    """The block of CIFAR ResNets; the shortcut skips pixels and pads channels with zeros."""

    def __init__(self, inward: int, outward: int, stride: int, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inward, outward, 3, stride, 1, bias=False), norm(outward)
        self.conv2, self.norm2 = nn.Conv2d(outward, outward, 3, 1, 1, bias=False), norm(outward)
        self.stride, self.margin = stride, (outward - inward) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        if self.margin:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.margin, self.margin))
        return functional.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet-20 has three blocks per stage and width 16."""

    def __init__(self, norm=nn.BatchNorm2d, width: int = 4, blocks: int = 1):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), norm(width)
        layers = []
        for stage, inward in enumerate((width, width, 2 * width)):
            outward = width * 2**stage
            layers.append(Residual(inward, outward, 2 if stage else 1, norm))
            layers.extend(Residual(outward, outward, 1, norm) for _ in range(blocks - 1))
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(functional.relu(self.norm(self.conv(x)))).mean((2, 3)))


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(45, 7), nn.ReLU(), nn.Linear(7, 3),
    )  # fmt: skip


def vgg(*, norm: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for inward, outward in ((3, 6), (6, 8), (8, 8)):
        layers += [
            nn.Conv2d(inward, outward, 3, padding=1),
            *([nn.BatchNorm2d(outward)] if norm else []),
            nn.ReLU(True),
        ]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 4)
    )


class UNet(nn.Module):
    """Down, up by a transposed convolution, and the skipped features concatenated."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.up, self.join, self.out = nn.ConvTranspose2d(6, 5, 2, 2), nn.Conv2d(9, 7, 3, padding=1), nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = functional.relu(self.down1(x))
        deep = functional.relu(self.down2(functional.max_pool2d(skip, 2)))
        return self.out(functional.relu(self.join(torch.cat([skip, self.up(deep)], dim=1))))


class Shuffle(nn.Module):
    """Half of the channels pass, half are worked on, then both are interleaved."""

    def __init__(self):
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.point, self.out = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = self.stem(x).relu().chunk(2, dim=1)
        x = torch.cat((kept, self.point(self.depth(worked)).relu()), dim=1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.out(x)


class Dense(nn.Module):
    """Every layer reads all features before it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 3 * i, 3, 3, padding=1) for i in range(2))
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, conv(functional.relu(norm(x)))], dim=1)
        return self.head(self.norms[2](x).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Inverted residual with depthwise convolution, squeeze and excitation, and a learned scale of the branch."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide, self.depth = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 12, 1),
            nn.Conv2d(12, 12, 3, padding=1, groups=12),
        )
        self.squeeze, self.excite, self.narrow = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)
        self.scale, self.head = nn.Parameter(torch.full((4, 1, 1), 1e-6)), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = functional.silu(self.depth(functional.silu(self.wide(x))))
        y = y * self.excite(functional.silu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head((x + self.scale * self.narrow(y)).mean((2, 3)))


class Tied(nn.Module):
    """One hidden layer applied twice, a table that is also the output layer, and layers that are never called."""

    def __init__(self):
        super().__init__()
        self.inward, self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.again, self.idle = self.hidden, nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.again(torch.tanh(self.hidden(torch.tanh(self.inward(x)))))))


class TwoHeads(nn.Module):
    """Two inputs of different kinds, a tuple holding a dict as output."""

    def __init__(self):
        super().__init__()
        self.image, self.words = nn.Linear(6, 5), nn.Embedding(9, 5)
        self.joint, self.a, self.b = nn.Linear(10, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, image: Tensor, words: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.cat([self.image(image).relu(), self.words(words).mean(1)], dim=-1)
        x = self.joint(x).relu()
        return self.a(x), {"b": self.b(x), "norm": x.norm(dim=-1)}


class Auxiliary(nn.Module):
    """A second head that only training uses."""

    def __init__(self):
        super().__init__()
        self.body, self.drop, self.head, self.helper = nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 3), nn.Linear(6, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.body(x).relu()
        if not self.training:
            return self.head(x)
        return self.head(x), self.last(self.drop(self.helper(x).relu()))


class Recurrent(nn.Module):
    """Tokens through a recurrent layer; the outputs, or the last hidden states of both directions, to a head."""

    def __init__(self, layer: nn.RNNBase, *, states: bool = False):
        super().__init__()
        self.tokens, self.layer, self.states = nn.Embedding(11, layer.input_size), layer, states
        width = getattr(layer, "proj_size", 0) or layer.hidden_size
        self.head = nn.Linear(width * (2 if layer.bidirectional else 1), 3)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs, state = self.layer(self.tokens(tokens))
        if not self.states:
            return self.head(outputs)
        state = state[0] if isinstance(state, tuple) else state
        return self.head(torch.cat([state[-2], state[-1]], dim=-1))
