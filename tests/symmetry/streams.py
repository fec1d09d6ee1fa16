"""Networks with residual streams, small: before or after their norms, spelled out, tied, shared and cast."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.sequences import Transformer
from tests.symmetry import transformers as former
from tests.symmetry.families import TEXT, Inputs, gpt, noise


class Vit(nn.Module):
    """Patches by a convolution, a last token for the class, positions, causal pre-norm blocks."""

    def __init__(self, width: int = 12, heads: int = 3, depth: int = 2):
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(
            *(former.Block(former.PackedAttention(width, heads), former.Mlp(width, 20), width) for _ in range(depth))
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([x, self.token.expand(len(x), -1, -1)], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, -1])


class Bert(nn.Module):
    """Post-norm: the norms' outputs are the stream. A pooler with a tanh is classified."""

    def __init__(self, width: int = 12, heads: int = 3):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, width), nn.Embedding(5, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, heads, 20, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
        )
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1])))
        return self.head(torch.tanh(self.pooler(self.layers(x)[:, 0])))


class EncoderDecoder(nn.Module):
    """Pre-norm: the weight of the cross-attention is split among the decoder's stream and what the encoder returns."""

    def __init__(self, width: int = 12, heads: int = 3):
        super().__init__()
        self.inward, self.more, self.outward = nn.Linear(5, width), nn.Linear(5, width), nn.Linear(width, 3)
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.encoder = nn.TransformerEncoderLayer(width, heads, 20, **options)
        self.encoded, self.decoded = nn.LayerNorm(width), nn.LayerNorm(width)
        self.decoder = nn.TransformerDecoderLayer(width, heads, 20, **options)

    def forward(self, x: Tensor) -> Tensor:
        read = self.encoded(self.encoder(self.inward(x)))
        return self.outward(self.decoded(self.decoder(self.more(x[:, 1:]), read)))


class SpelledOut(nn.Module):
    """LayerNorm written by hand, in single precision inside, and one with a scale of its own."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.inward, self.middle, self.outward = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.scale, self.shift = (nn.Parameter(torch.randn(width)) for _ in range(2))
        self.gain = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        y = x.float()
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        x = x + self.middle(y.to(x.dtype) * self.scale + self.shift)
        return self.outward(functional.layer_norm(x, x.shape[-1:]) * self.gain)


class Twice(nn.Module):
    """One norm and one layer, applied twice."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.inward, self.norm = nn.Linear(5, width), nn.LayerNorm(width)
        self.layer, self.outward = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        for _ in range(2):
            x = x + self.layer(self.norm(x))
        return self.outward(x)


class ChannelsLast(nn.Module):
    """A norm over channels that convolutions read: without padding, and with it."""

    def __init__(self, padding: int):
        super().__init__()
        self.inward, self.norm = nn.Conv2d(3, 8, 1), nn.LayerNorm(8)
        self.outward = nn.Conv2d(8, 2, 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.outward(self.norm(self.inward(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def llama() -> nn.Module:
    """Rotary positions, gated hidden layers, and RMSNorm as Llama writes it, also before the head."""
    block = former.Block(former.Attention(12, 3, rotary=True), former.GatedMlp(12, 20), 12, former.RmsNorm)
    network = former.Decoder(block, tied=False, positions=False)
    network.norm = former.RmsNorm(12)
    return network


STREAMS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "pre-norm": (lambda: Transformer(12, 3, 2), noise(2, 8, 8)),
    "vit": (Vit, noise(2, 3, 8, 8)),
    "gpt": (partial(gpt, partial(former.PackedAttention, 12, 3), tied=False), TEXT),
    "gpt-tied": (partial(gpt, partial(former.PackedAttention, 12, 3)), TEXT),
    "gpt-without-biases": (partial(gpt, partial(former.Attention, 12, 3), tied=False), TEXT),
    "bert": (Bert, TEXT),
    "llama": (llama, TEXT),
    "encoder-decoder": (EncoderDecoder, noise(2, 4, 5)),
    "spelled-out": (SpelledOut, noise(4, 5)),
    "twice": (Twice, noise(4, 5)),
    "channels-last": (partial(ChannelsLast, 0), noise(2, 3, 6, 6)),
    "channels-last-padded": (partial(ChannelsLast, 1), noise(2, 3, 6, 6)),
}


def made(name: str, seed: int = 0) -> nn.Module:
    """A network in evaluation mode, scales and shifts random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = STREAMS[name][0]().eval()
        for value in network.parameters():
            if value.ndim == 1:
                value.data += 0.2 * torch.randn(value.shape)
    return network
