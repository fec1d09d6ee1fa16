"""Every family of networks that symmetry tracing must understand: its smallest member, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.network.calibration import as_inputs
from c2m3_fl.symmetry.discover import derive
from c2m3_fl.symmetry.proof import Prover
from tests.symmetry import convolutional as conv
from tests.symmetry import transformers as former

Inputs = Tensor | tuple[Tensor, ...]
Build = Callable[[], nn.Module]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def tokens(*shape: int, size: int = 9) -> Tensor:
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(1))


def gpt(
    attention: Build,
    mlp: Build | None = None,
    *,
    width: int = 12,
    norm: type[nn.Module] = nn.LayerNorm,
    **options: bool,
):
    mlp = mlp or partial(former.Mlp, width, 20)
    return former.Decoder(former.Block(attention(), mlp(), width, norm), width=width, **options)


class Lambda(nn.Module):
    """Named layers and a function of them."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *xs: Tensor) -> Tensor:
        return self.function(self, *xs)


def norms(channels: int, kind: str) -> nn.Module:
    return {
        "batch": lambda: nn.BatchNorm2d(channels),
        "layer": lambda: conv.ChannelNorm(channels),
        "group1": lambda: nn.GroupNorm(1, channels),
        "group2": lambda: nn.GroupNorm(2, channels),
        "instance": lambda: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True),
    }[kind]()


NORMS = ("batch", "layer", "group1", "group2", "instance")
IMAGE = noise(2, 3, 8, 8)
TEXT = tokens(2, 5)

SMALL: dict[str, tuple[Build, Inputs]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)),
        noise(2, 3, 4),
    ),
    "lenet": (conv.lenet, noise(2, 1, 12, 12)),
    "vgg": (partial(conv.vgg, norm=False), noise(2, 3, 16, 16)),
    "vgg-bn": (partial(conv.vgg, norm=True), noise(2, 3, 16, 16)),
    **{f"cifar-{kind}": (partial(conv.CifarResNet, partial(norms, kind=kind)), IMAGE) for kind in NORMS},
    "unet": (conv.UNet, noise(2, 1, 8, 8)),
    "shuffle": (conv.Shuffle, IMAGE),
    "dense": (conv.Dense, noise(2, 2, 5, 5)),
    "squeeze-excite": (conv.SqueezeExcite, IMAGE),
    "tied": (conv.Tied, noise(3, 4)),
    "two-heads": (conv.TwoHeads, (noise(2, 6), tokens(2, 4))),
    "auxiliary": (conv.Auxiliary, noise(3, 4)),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1)
        ),
        IMAGE,
    ),
    "grouped-norm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.GroupNorm(8, 16), nn.ReLU(), nn.Conv2d(16, 6, 3, groups=2), nn.Conv2d(6, 2, 1)
        ),
        IMAGE,
    ),
    "depthwise-multiplier": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1)),
        IMAGE,
    ),
    "transposed-grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1)
        ),
        IMAGE,
    ),
    "one-dimensional": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ConvTranspose1d(8, 6, 2), nn.PReLU(6), nn.Conv1d(6, 2, 1)
        ),
        noise(2, 3, 9),
    ),
    "three-dimensional": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 4, 3, bias=False),
            nn.InstanceNorm3d(4, affine=True),
            nn.AvgPool3d(2),
            nn.Flatten(),
            nn.Linear(32, 5),
            nn.GELU(),
            nn.Linear(5, 2),
        ),
        noise(2, 1, 6, 6, 6),
    ),
    "pixel-shuffle": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3),
            nn.PixelShuffle(2),
            nn.Conv2d(3, 4, 3),
            nn.ReLU(),
            nn.PixelUnshuffle(2),
            nn.Conv2d(16, 2, 1),
        ),
        IMAGE,
    ),
    "channel-shuffle": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 1),
            nn.Conv2d(12, 12, 3, groups=3),
            nn.ChannelShuffle(3),
            nn.ReLU(),
            nn.Conv2d(12, 12, 1, groups=3),
            nn.ReLU(),
            nn.Conv2d(12, 2, 1),
        ),
        IMAGE,
    ),
    "glu": (lambda: nn.Sequential(nn.Linear(4, 12), nn.GLU(), nn.Linear(6, 3)), noise(2, 4)),
    "maxout": (
        lambda: Lambda(lambda net, x: net.o(net.a(x).view(-1, 6, 2).amax(-1)), a=nn.Linear(4, 12), o=nn.Linear(6, 2)),
        noise(3, 4),
    ),
    "bilinear": (
        lambda: Lambda(
            lambda net, x: net.o(net.m(net.a(x), net.b(x)).relu()),
            a=nn.Linear(4, 6),
            b=nn.Linear(4, 5),
            m=nn.Bilinear(6, 5, 7),
            o=nn.Linear(7, 2),
        ),
        noise(3, 4),
    ),
    "weight-norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3)),
        noise(3, 4),
    ),
    "unfold": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Unfold(2, stride=2), nn.Conv1d(24, 5, 1), nn.ReLU(), nn.Conv1d(5, 2, 1)
        ),
        IMAGE,
    ),
    "lstm": (lambda: conv.Recurrent(nn.LSTM(6, 8, 2, batch_first=True)), TEXT),
    "lstm-bidirectional": (
        lambda: conv.Recurrent(nn.LSTM(6, 8, bidirectional=True, batch_first=True), states=True),
        TEXT,
    ),
    "lstm-projected": (lambda: conv.Recurrent(nn.LSTM(6, 8, proj_size=3)), TEXT),
    "gru": (lambda: conv.Recurrent(nn.GRU(6, 8, bias=False, batch_first=True)), TEXT),
    "rnn": (lambda: conv.Recurrent(nn.RNN(6, 8, 2, bidirectional=True)), TEXT),
    "gpt-packed": (partial(gpt, partial(former.PackedAttention, 12, 3)), TEXT),
    "gpt-separate": (partial(gpt, partial(former.Attention, 12, 3), tied=False), TEXT),
    "llama": (
        partial(
            gpt,
            partial(former.Attention, 12, 3, rotary=True),
            partial(former.GatedMlp, 12, 20),
            norm=former.RmsNorm,
            tied=False,
            positions=False,
        ),
        TEXT,
    ),
    "grouped-query": (partial(gpt, partial(former.Attention, 24, 6, key_heads=2), width=24, norm=nn.RMSNorm), TEXT),
    "grouped-query-native": (partial(gpt, partial(former.Attention, 24, 6, key_heads=2, native=True), width=24), TEXT),
    "grouped-query-rotary": (
        partial(gpt, partial(former.Attention, 24, 6, key_heads=2, rotary=True), width=24, positions=False),
        TEXT,
    ),
    "grouped-query-packed": (partial(gpt, partial(former.PackedGroupedAttention, 24, 6, 2), width=24), TEXT),
    "multi-query": (partial(gpt, partial(former.Attention, 12, 3, key_heads=1)), TEXT),
    "attention-einsum": (lambda: former.Between(former.EinsumAttention(12, 3)), noise(2, 5, 7)),
    "attention-module": (lambda: former.SelfAttention(12, 3), noise(2, 5, 12)),
    "encoder": (
        lambda: former.Between(
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=True), 1, enable_nested_tensor=False
            )
        ),
        noise(2, 5, 7),
    ),
    "encoder-decoder": (
        lambda: former.Between(nn.Transformer(12, 2, 1, 1, 20, batch_first=True)),
        (noise(2, 5, 7), noise(2, 4, 7)),
    ),
}

ZOO = (  # the smallest member of every torchvision family
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vit_b_32",
    "wide_resnet50_2",
)  # fmt: skip


def build(name: str, seed: int = 0) -> nn.Module:
    """A small network with random weights, no parameter constant."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SMALL[name][0]()
    return network.eval()


@dataclass(frozen=True)
class Traced:
    """A small network, what tracing found about it, and copies that prove it."""

    network: nn.Module
    inputs: Inputs
    spec: PermutationSpec
    provers: tuple[Prover, ...]

    def error(self, spec: PermutationSpec, chosen: list[str] | None = None) -> float:
        """Largest relative change of outputs over the traced modes."""
        return max(prover.error(spec, chosen) for prover in self.provers)


@cache
def traced(name: str) -> Traced:
    """Trace a family once for all tests; nothing is pinned after the fact."""
    network, inputs = build(name), SMALL[name][1]
    spec, modes = derive(network, as_inputs(inputs))
    return Traced(network, inputs, spec, tuple(Prover(network, as_inputs(inputs), training=mode) for mode in modes))
