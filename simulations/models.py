"""The networks of the comparisons: MLP, CNNs, LeNet, VGG, ResNet and ViT, for any image size and number of classes.

Those that read text are in `simulations.language_models`.

They are ordinary ``torch.nn`` code that does not depend on this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from c2m3_fl.errors import ConfigError
from simulations.language_models import CharacterLstm, Gpt
from simulations.settings import Settings
from simulations.vit import Vit

Shape = tuple[int, int, int]  # channels, height, width of one image

_VGG = {  # channels of the convolutions, "M" a pooling by two
    "vgg11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg16": (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
}

_TEXT: Mapping[str, Callable[[float, int, int], nn.Module]] = {  # from width, classes and length of the text
    "lstm": lambda width, classes, _length: CharacterLstm(max(1, round(256 * width)), classes),
    "gpt": lambda width, classes, length: Gpt(4 * max(1, round(32 * width)), classes, length),
}


def build_model(settings: Settings, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """The network that the settings name; its initial weights depend only on `seed`.

    Parameters
    ----------
    settings : Settings
        Fields ``model``, ``hidden_widths`` and ``width``.
    shape : tuple of int
        Channels, height and width of an image, or the length of a text.
    classes : int
        Width of the output.
    seed : int
        Seed of the initialisation; the global random state is left as it was.

    Raises
    ------
    ConfigError
        When the images are too small for the network, or it reads text and the data are images, or the reverse.
    """
    if (len(shape) == 1) != (settings.model in _TEXT):
        kind = "text: set model to one of " + ", ".join(_TEXT) if len(shape) == 1 else "images: choose another model"
        raise ConfigError(f"model is {settings.model!r}, but {settings.data!r} are {kind}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if len(shape) == 1:
            return _TEXT[settings.model](settings.width, classes, shape[0])
        return _build(settings, _large_enough(settings, (shape[0], shape[1], shape[2])), classes)


def _large_enough(settings: Settings, shape: Shape) -> Shape:
    smallest = 32 if settings.model.startswith("vgg") else 16 if settings.model == "lenet" else 8
    if settings.model != "mlp" and min(shape[1:]) < smallest:
        raise ConfigError(
            f"model {settings.model!r} needs images of at least {smallest}x{smallest} pixels, "
            f"{settings.data!r} has {shape[1]}x{shape[2]}: set image-size={smallest}"
        )
    return shape


def _build(settings: Settings, shape: Shape, classes: int) -> nn.Module:
    def scaled(channels: int) -> int:
        return max(1, round(channels * settings.width))

    name = settings.model
    if name == "mlp":
        return mlp(shape, settings.widths, classes)
    if name == "cnn":
        return cnn(shape, [scaled(32), scaled(64)], scaled(128), classes)
    if name == "conv3":
        return conv3(shape, scaled(128), classes)
    if name == "cnn-pooled":
        return cnn_pooled(shape[0], [scaled(6), scaled(32)], [scaled(120), scaled(84)], classes)
    if name == "vit":
        return Vit(shape, 4 * max(1, round(24 * settings.width)), classes)
    if name == "lenet":
        return lenet(shape, scaled, classes)
    if name.startswith("vgg"):
        return vgg(_VGG[name.removesuffix("-bn")], shape[0], scaled, classes, normalised=name.endswith("-bn"))
    norm = ChannelNorm if name.endswith("-ln") else nn.BatchNorm2d
    return ResNet(shape[0], scaled(16), classes, norm, blocks=1 if name.startswith("resnet8") else 3)


def mlp(shape: Shape, widths: Sequence[int], classes: int) -> nn.Sequential:
    """Fully connected network with ReLU."""
    sizes = [shape[0] * shape[1] * shape[2], *widths]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def cnn(shape: Shape, channels: Sequence[int], hidden: int, classes: int) -> nn.Sequential:
    """Blocks of convolution and pooling, one hidden layer."""
    layers: list[nn.Module] = []
    inputs, (height, width) = shape[0], shape[1:]
    for outputs in channels:
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        inputs, height, width = outputs, height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(inputs * height * width, hidden), nn.ReLU(), nn.Linear(hidden, classes)]
    return nn.Sequential(*layers)


def conv3(shape: Shape, width: int, classes: int) -> nn.Sequential:
    """Convolution, pooling, convolution, pooling, convolution, linear layer (Dai et al., Co-Boosting, 2024)."""
    layers: list[nn.Module] = []
    for index, inputs in enumerate((shape[0], width, width)):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(2)] if index < 2 else [])]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (shape[1] // 4) * (shape[2] // 4), classes))


def cnn_pooled(inputs: int, channels: Sequence[int], hidden: Sequence[int], classes: int) -> nn.Sequential:
    """Convolutions with pooling, then global average pooling and hidden layers (Crisostomi et al., C2M3, 2024)."""
    layers: list[nn.Module] = []
    for narrow, wide in pairwise([inputs, *channels]):
        layers += [nn.Conv2d(narrow, wide, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for narrow, wide in pairwise([channels[-1], *hidden]):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], classes))


def lenet(shape: Shape, scaled: Callable[[int], int], classes: int) -> nn.Sequential:
    """LeNet-5 with ReLU and max pooling."""
    height, width = ((side - 4) // 2 for side in shape[1:])
    height, width = (height - 4) // 2, (width - 4) // 2
    one, two, three, four = scaled(6), scaled(16), scaled(120), scaled(84)
    return nn.Sequential(
        *(nn.Conv2d(shape[0], one, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(one, two, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(two * height * width, three), nn.ReLU()),
        *(nn.Linear(three, four), nn.ReLU(), nn.Linear(four, classes)),
    )


def vgg(
    plan: Sequence[int | str], inputs: int, scaled: Callable[[int], int], classes: int, *, normalised: bool
) -> nn.Sequential:
    """VGG for small images: convolutions as planned, then one linear layer."""
    layers: list[nn.Module] = []
    for step in plan:
        if isinstance(step, str):
            layers.append(nn.MaxPool2d(2))
            continue
        outputs = scaled(step)
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()] if normalised else [nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every pixel."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (n, c, h, w) over c."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Two convolutions with a shortcut, which is a 1x1 convolution if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features of the same or, with stride 2, half the size."""
        hidden = torch.relu(self.norm1(self.conv1(images)))
        return torch.relu(self.norm2(self.conv2(hidden)) + self.shortcut(images))


class ResNet(nn.Module):
    """The CIFAR ResNet of 6 blocks + 2 layers (He et al. 2016, section 4.2), with a norm of choice.

    Parameters
    ----------
    inputs : int
        Channels of an image.
    width : int
        Channels of the first stage; 16 in the paper.
    classes : int
        Width of the output.
    norm : callable
        From a number of channels to a norm over them.
    blocks : int
        Blocks of each of the three stages: 1 for ResNet8, 3 for ResNet20.
    """

    def __init__(
        self, inputs: int, width: int, classes: int, norm: Callable[[int], nn.Module], *, blocks: int = 3
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.norm = norm(width)
        stages = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        self.blocks = nn.Sequential(
            *(
                Block(before if position == 0 else after, after, stride if position == 0 else 1, norm)
                for before, after, stride in stages
                for position in range(blocks)
            )
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        features = self.blocks(torch.relu(self.norm(self.stem(images))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits
