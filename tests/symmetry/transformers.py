"""Transformers as people write them, small."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of (…, T, d), the two halves of a head paired."""
    length, width = x.shape[-2:]
    speed = 1 / 10_000 ** (torch.arange(0, width, 2, dtype=x.dtype) / width)
    angle = torch.outer(torch.arange(length, dtype=x.dtype), speed).repeat(1, 2)
    left, right = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat((-right, left), dim=-1) * angle.sin()


class Attention(nn.Module):
    """Causal self-attention with separate projections; fewer key heads than heads share them."""

    def __init__(
        self, width: int, heads: int, *, key_heads: int | None = None, rotary: bool = False, native: bool = False
    ):
        super().__init__()
        self.heads, self.key_heads, self.rotary, self.native = heads, key_heads or heads, rotary, native
        self.size = width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, self.key_heads * self.size, bias=False)
        self.v = nn.Linear(width, self.key_heads * self.size, bias=False)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = self.q(x).view(batch, length, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(batch, length, self.key_heads, self.size).transpose(1, 2)
        v = self.v(x).view(batch, length, self.key_heads, self.size).transpose(1, 2)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        if self.native:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = (self.repeat(z) for z in (k, v))
            scores = q @ k.transpose(-2, -1) / self.size**0.5
            mask = torch.ones(length, length, dtype=torch.bool).triu(1)
            y = scores.masked_fill(mask, float("-inf")).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(batch, length, width))

    def repeat(self, x: Tensor) -> Tensor:
        batch, heads, length, size = x.shape
        repeats = self.heads // heads
        return x[:, :, None].expand(batch, heads, repeats, length, size).reshape(batch, heads * repeats, length, size)


class PackedAttention(nn.Module):
    """Causal self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(x).split(width, dim=2)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).contiguous().view(batch, length, width))


class PackedGroupedAttention(nn.Module):
    """Queries, keys and values from one projection, several query heads to a key head."""

    def __init__(self, width: int, heads: int, key_heads: int):
        super().__init__()
        self.heads, self.key_heads, self.size = heads, key_heads, width // heads
        self.qkv = nn.Linear(width, (heads + 2 * key_heads) * self.size)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(x).view(batch, length, -1, self.size).transpose(1, 2)
        q, k, v = parts.split([self.heads, self.key_heads, self.key_heads], dim=1)
        k, v = (z.repeat_interleave(self.heads // self.key_heads, dim=1) for z in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, width))


class EinsumAttention(nn.Module):
    """Attention with weights of shape (width, heads, size)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        size = width // heads
        self.q, self.k, self.v = (nn.Parameter(torch.randn(width, heads, size) / 4) for _ in range(3))
        self.o = nn.Parameter(torch.randn(heads, size, width) / 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,chd->bthd", x, weight) for weight in (self.q, self.k, self.v))
        scores = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        return torch.einsum("bhts,bshd,hdc->btc", scores, v, self.o)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


class GatedMlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class RmsNorm(nn.Module):
    """As Llama writes it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module, width: int, norm: type[nn.Module] = nn.LayerNorm):
        super().__init__()
        self.n1, self.attn, self.n2, self.mlp = norm(width), attention, norm(width), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        return x + self.mlp(self.n2(x))


class Decoder(nn.Module):
    """A language model: tokens in, logits out; the table of embeddings may serve as the head."""

    def __init__(self, *blocks: nn.Module, width: int = 12, tied: bool = True, positions: bool = True):
        super().__init__()
        self.tokens = nn.Embedding(17, width)
        self.positions = nn.Parameter(torch.randn(1, 5, width)) if positions else None
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 17, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions
        return self.head(self.norm(self.blocks(x)))


class Between(nn.Module):
    """Linear layers before and after something of the given width."""

    def __init__(self, middle: nn.Module, inputs: int = 7, width: int = 12, outputs: int = 4):
        super().__init__()
        self.inward, self.middle, self.outward = nn.Linear(inputs, width), middle, nn.Linear(width, outputs)

    def forward(self, *xs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.outward(self.middle(*(self.inward(x) for x in xs)))}


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of something with itself, its averaged weights as second output."""

    def __init__(self, width: int, heads: int, **options: object):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True, **options)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        y, weights = self.attn(x, x, x)
        return self.head(x + y), weights
