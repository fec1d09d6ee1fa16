"""The networks of the benchmarks as specs, and nodes that look like trained ones: related, each in its own order."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.spec import Axis, Group, PermutationSpec, Segment, TensorSpec


def _on(group: str | None, size: int, inner: int = 1) -> Axis:
    return () if group is None else (Segment.contiguous(group, size, inner=inner),)


class _Builder:
    """Collects groups and tensors; every call adds one layer."""

    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}
        self.tensors: dict[str, TensorSpec] = {}

    def linear(self, name: str, fan_in: tuple[str | None, int, int], fan_out: tuple[str | None, int]) -> None:
        rows, columns = _on(*fan_out), _on(*fan_in)
        self.tensors[f"{name}.weight"] = TensorSpec((fan_out[1], fan_in[1] * fan_in[2]), (rows, columns))
        self.tensors[f"{name}.bias"] = TensorSpec((fan_out[1],), (rows,))
        self._groups((fan_in[0], fan_in[1]), fan_out)

    def conv(
        self, name: str, fan_in: tuple[str | None, int], fan_out: tuple[str | None, int], kernel: int, *, norm: bool
    ) -> None:
        axes = (_on(*fan_out), _on(*fan_in), (), ())
        self.tensors[f"{name}.weight"] = TensorSpec((fan_out[1], fan_in[1], kernel, kernel), axes)
        for part in ("weight", "bias") if norm else ("conv_bias",):
            self.tensors[f"{name}.norm.{part}"] = TensorSpec((fan_out[1],), (_on(*fan_out),))
        self._groups(fan_in, fan_out)

    def _groups(self, *ends: tuple[str | None, int]) -> None:
        for name, size in ends:
            if name is not None:
                self.groups[name] = Group(size)

    def spec(self) -> PermutationSpec:
        return PermutationSpec(self.groups, self.tensors)


def mlp(*widths: int) -> PermutationSpec:
    """Linear layers with biases."""
    build, last = _Builder(), len(widths) - 2
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        left = None if layer == 0 else f"h{layer - 1}"
        build.linear(f"{layer}", (left, fan_in, 1), (None if layer == last else f"h{layer}", fan_out))
    return build.spec()


def resnet20(width: int, classes: int = 10) -> PermutationSpec:
    """CIFAR ResNet20, its three stages 16, 32 and 64 channels times `width`."""
    build, stream = _Builder(), ("stage0", 16 * width)
    build.conv("conv1", (None, 3), stream, 3, norm=True)
    for stage in range(3):
        out = (f"stage{stage}", 16 * width << stage)
        for block in range(3):
            name = f"layer{stage}.{block}"
            middle = (name, out[1])
            build.conv(f"{name}.conv1", stream, middle, 3, norm=True)
            build.conv(f"{name}.conv2", middle, out, 3, norm=True)
            if stream != out:
                build.conv(f"{name}.shortcut", stream, out, 1, norm=True)
                stream = out
    build.linear("fc", (*stream, 1), (None, classes))
    return build.spec()


def resnet50(classes: int = 1000) -> PermutationSpec:
    """torchvision's ResNet50."""
    build, stream = _Builder(), ("stem", 64)
    build.conv("conv1", (None, 3), stream, 7, norm=True)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        planes = 64 << stage
        out = (f"stage{stage}", 4 * planes)
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            first, second = (f"{name}.1", planes), (f"{name}.2", planes)
            build.conv(f"{name}.conv1", stream, first, 1, norm=True)
            build.conv(f"{name}.conv2", first, second, 3, norm=True)
            build.conv(f"{name}.conv3", second, out, 1, norm=True)
            if stream != out:
                build.conv(f"{name}.shortcut", stream, out, 1, norm=True)
                stream = out
    build.linear("fc", (*stream, 1), (None, classes))
    return build.spec()


def vgg16(classes: int = 10) -> PermutationSpec:
    """VGG16 for 32 x 32 images: thirteen convolutions and the three linear layers of 512 units."""
    build, left = _Builder(), (None, 3)
    for layer, size in enumerate((64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)):
        build.conv(f"features.{layer}", left, (f"c{layer}", size), 3, norm=False)
        left = (f"c{layer}", size)
    build.linear("classifier.0", (*left, 1), ("f0", 512))
    build.linear("classifier.1", ("f0", 512, 1), ("f1", 512))
    build.linear("classifier.2", ("f1", 512, 1), (None, classes))
    return build.spec()


def related_nodes(spec: PermutationSpec, count: int, *, noise: float = 1.0, seed: int = 0) -> list[dict[str, Tensor]]:
    """One random network plus noise of `noise` times its size, every copy in a random order of its own.

    Weights have variance 1 / fan-in and a heavy-tailed scale per unit, as training leaves them.
    """
    generator = torch.Generator().manual_seed(seed)
    base = {}
    for name, tensor in spec.tensors.items():
        fan_in = max(1, tensor.shape[1:].__len__() and int(torch.tensor(tensor.shape[1:]).prod()))
        scale = torch.randn(tensor.shape[0], generator=generator).mul(0.5).exp()
        drawn = torch.randn(tensor.shape, generator=generator) / fan_in**0.5
        base[name] = drawn * scale.reshape(-1, *[1] * (len(tensor.shape) - 1))
    nodes = []
    for _ in range(count):
        node = {
            name: value + noise * value.std(correction=0) * torch.randn(value.shape, generator=generator)
            for name, value in base.items()
        }
        nodes.append(permutation.apply(spec, permutation.random(spec, generator), node))
    return nodes
