"""The parameterised operators of a traced network, and how a change of their output folds into their parameters.

An operator's *channels* are the coordinates of its output, one for each row of its weight: the last axis of a
linear layer, axis 1 of a convolution, the normalised axes of a LayerNorm. Rescaling a channel of the output,
``y -> scale * y + shift``, is the same as rescaling its row of the weight and its bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, fx

from c2m3_fl.core.spec import Params

_aten = torch.ops.aten


class Kind(Enum):
    """Kinds of parameterised operators."""

    LINEAR = "linear"
    CONVOLUTION = "convolution"
    TRANSPOSED = "transposed convolution"
    PRODUCT = "matrix product"
    BATCH_NORM = "batch norm"
    NORM = "norm"


@dataclass(frozen=True)
class Layout:
    """Where an ATen operator keeps its arguments.

    Attributes
    ----------
    kind : Kind
        Kind of the operator.
    arguments : tuple of int
        Positions of input, weight and bias; -1 for an operator without bias.
    channel : int
        Channel axis of the output; ignored for norms over several axes.
    spatial : int
        Number of spatial dimensions of a convolution.
    """

    kind: Kind
    arguments: tuple[int, int, int]
    channel: int
    spatial: int = 0


def _convolutions() -> dict[object, Layout]:
    table: dict[object, Layout] = {}
    for spatial, (plain, transposed) in enumerate(
        (
            (_aten.conv1d, _aten.conv_transpose1d.default),
            (_aten.conv2d, _aten.conv_transpose2d.input),
            (_aten.conv3d, _aten.conv_transpose3d.input),
        ),
        start=1,
    ):
        layout = Layout(Kind.CONVOLUTION, (0, 1, 2), -1 - spatial, spatial)
        table |= {plain.default: layout, plain.padding: layout}
        table[transposed] = Layout(Kind.TRANSPOSED, (0, 1, 2), -1 - spatial, spatial)
    return table


LAYOUTS: dict[object, Layout] = {
    _aten.linear.default: Layout(Kind.LINEAR, (0, 1, 2), -1),
    _aten.addmm.default: Layout(Kind.PRODUCT, (1, 2, 0), -1),
    _aten.mm.default: Layout(Kind.PRODUCT, (0, 1, -1), -1),
    _aten.matmul.default: Layout(Kind.PRODUCT, (0, 1, -1), -1),
    _aten.batch_norm.default: Layout(Kind.BATCH_NORM, (0, 1, 2), 1),
    _aten.layer_norm.default: Layout(Kind.NORM, (0, 2, 3), -1),
    _aten.rms_norm.default: Layout(Kind.NORM, (0, 2, -1), -1),
    _aten.group_norm.default: Layout(Kind.NORM, (0, 2, 3), 1),
    _aten.instance_norm.default: Layout(Kind.NORM, (0, 1, 2), 1),
    **_convolutions(),
}

# The axis of a weight that indexes the operator's output channels; axis 1 - OUTPUT_AXIS indexes its input channels.
OUTPUT_AXIS = {Kind.LINEAR: 0, Kind.CONVOLUTION: 0, Kind.PRODUCT: 1, Kind.TRANSPOSED: 1}

RECURRENT = (_aten.lstm.input, _aten.gru.input, _aten.rnn_tanh.input, _aten.rnn_relu.input)


def obstacle(target: object) -> str:
    """Why an operator's output cannot be corrected through its parameters."""
    return "has recurrent gates" if target in RECURRENT else "has no channels"


@dataclass(frozen=True)
class Window:
    """How a convolution slides: per spatial axis its stride, its dilation, and the padding on both sides."""

    stride: Sequence[int]
    dilation: Sequence[int]
    padding: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Operator:
    """One call of an operator with parameters of its own.

    Attributes
    ----------
    node : fx.Node
        The call in the traced graph.
    index : int
        Its place in the graph.
    layout : Layout
        How its arguments are ordered.
    module : str
        Path of the module that makes the call.
    weight, bias, mean, variance : str
        Names in the state dict; "" for a tensor that the operator lacks. `mean` and `variance` are running statistics.
    final : bool
        Whether its output reaches the network's output without passing another operator.
    feeds_norm : bool
        Whether only a BatchNorm over the channels uses the output; its new statistics undo any rescaling.
    """

    node: fx.Node
    index: int
    layout: Layout
    module: str
    weight: str
    bias: str = ""
    mean: str = ""
    variance: str = ""
    final: bool = False
    feeds_norm: bool = False

    @property
    def name(self) -> str:
        """Unique name: that of its call in the graph."""
        return self.node.name

    @property
    def kind(self) -> Kind:
        """Kind of the operator."""
        return self.layout.kind

    @property
    def linear(self) -> bool:
        """Whether the output is an affine function of the input with the operator's own weights."""
        return self.kind in (Kind.LINEAR, Kind.CONVOLUTION, Kind.TRANSPOSED, Kind.PRODUCT)

    @property
    def input(self) -> fx.Node:
        """The node whose value the operator is applied to."""
        source = self.node.args[self.layout.arguments[0]]
        assert isinstance(source, fx.Node)
        return source

    @property
    def gives_output(self) -> bool:
        """Whether its output, unchanged, is an output of the network."""
        return any(user.op == "output" for user in self.node.users)

    @property
    def groups(self) -> int:
        """Number of groups of a convolution; 1 for everything else."""
        position = {Kind.CONVOLUTION: 6, Kind.TRANSPOSED: 6}.get(self.kind, -1)
        found = self.node.args[position] if 0 <= position < len(self.node.args) else self.node.kwargs.get("groups", 1)
        return found if isinstance(found, int) else 1

    def window(self, kernel: Sequence[int]) -> Window:
        """Geometry of a convolution whose kernel has these sizes."""
        spatial = len(kernel)

        def sizes(position: int, default: int) -> list[int]:
            found = self.node.args[position] if position < len(self.node.args) else default
            values = list(found) if isinstance(found, (list, tuple)) else [found]
            return [int(str(value)) for value in (values * spatial if len(values) == 1 else values)]

        stride, dilation = sizes(3, 1), sizes(5, 1)
        padding = self.node.args[4] if len(self.node.args) > 4 else 0
        if padding == "same":
            total = [reach * (size - 1) for reach, size in zip(dilation, kernel, strict=True)]
            return Window(stride, dilation, [(each // 2, each - each // 2) for each in total])
        sides = [0] * spatial if padding == "valid" else sizes(4, 0)
        return Window(stride, dilation, [(side, side) for side in sides])

    def channel_axes(self, params: Params) -> tuple[int, ...]:
        """Axes of the output whose coordinates are the channels."""
        normalised = self.kind is Kind.NORM and self.layout.channel == -1
        return tuple(range(-params[self.weight].ndim, 0)) if normalised else (self.layout.channel,)

    def rescaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Weight of the operator whose outputs are `scale` times those of `weight`; scale has one value per channel."""
        if self.kind in (Kind.NORM, Kind.BATCH_NORM):
            return weight * scale.reshape(weight.shape)
        if self.kind is Kind.PRODUCT:
            return weight * scale
        if self.kind is Kind.TRANSPOSED:
            spread = scale.reshape(self.groups, 1, weight.shape[1])
            spread = spread.expand(-1, weight.shape[0] // self.groups, -1).reshape(weight.shape[:2])
            return weight * spread.reshape(*weight.shape[:2], *(1,) * self.layout.spatial)
        return weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
