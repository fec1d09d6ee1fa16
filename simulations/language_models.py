"""Networks that predict the next character: an LSTM of two layers, and a small GPT.

They are ordinary ``torch.nn`` code that does not depend on this package. Called with windows of characters they give
the scores of the character after each window, so that whatever takes a classifier takes them; they train on the
prediction of every character of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_EMBEDDED = 8  # channels of a character for the LSTM, as in LEAF
_BLOCKS, _HEADS = 4, 4
_SPREAD = 0.02  # standard deviation of embeddings, as in GPT-2


class LanguageModel(nn.Module):
    """A network whose `states` at each character see only this character and those before it.

    Parameters
    ----------
    width : int
        Channels of the states.
    classes : int
        Number of characters.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes)

    def states(self, tokens: Tensor) -> Tensor:
        """States (n, length, width) of characters (n, length)."""
        raise NotImplementedError

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores (n, classes) of the character after each window (n, length)."""
        scores: Tensor = self.head(self.states(tokens)[:, -1])
        return scores

    def loss(self, tokens: Tensor, following: Tensor) -> Tensor:
        """Mean cross-entropy over all characters of the windows but the first, and those that follow them (n,)."""
        wanted = torch.cat([tokens[:, 1:], following[:, None]], dim=1)
        return nn.functional.cross_entropy(self.head(self.states(tokens)).transpose(1, 2), wanted)


class CharacterLstm(LanguageModel):
    """Embedding of 8 channels and an LSTM of two layers: LEAF (Caldas et al. 2018), 256 wide there."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, classes)
        self.embedding = nn.Embedding(classes, _EMBEDDED)
        self.lstm = nn.LSTM(_EMBEDDED, width, num_layers=2, batch_first=True)

    def states(self, tokens: Tensor) -> Tensor:
        """Outputs of the second layer."""
        steps: Tensor = self.lstm(self.embedding(tokens))[0]
        return steps


class Gpt(LanguageModel):
    """GPT-2 (Radford et al. 2019) with 4 blocks of 4 heads and an untied head.

    Parameters
    ----------
    width : int
        Channels of the stream, a multiple of 4.
    classes : int
        Number of characters.
    length : int
        Longest window.
    """

    def __init__(self, width: int, classes: int, length: int) -> None:
        super().__init__(width, classes)
        self.embedding = nn.Embedding(classes, width)
        self.positions = nn.Parameter(_SPREAD * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, is_causal=True) for _ in range(_BLOCKS)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=_SPREAD)

    def states(self, tokens: Tensor) -> Tensor:
        """The normalised stream after the last block."""
        stream: Tensor = self.blocks(self.embedding(tokens) + self.positions[: tokens.shape[1]])
        normalised: Tensor = self.norm(stream)
        return normalised


class Block(nn.Module):
    """Pre-norm block: self-attention of 4 heads, then a two-layer perceptron.

    Parameters
    ----------
    width : int
        Channels of the stream, a multiple of 4.
    is_causal : bool
        Whether attention sees only what came before.
    """

    def __init__(self, width: int, *, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, stream: Tensor) -> Tensor:
        """The stream (n, length, width) after this block."""
        read = self.first(stream)
        query, key, value = (_split(part(read)) for part in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        stream = stream + self.out(mixed.transpose(1, 2).flatten(2))
        written: Tensor = self.mlp(self.second(stream))
        return stream + written


def _split(channels: Tensor) -> Tensor:
    """(n, length, width) as (n, heads, length, width / heads)."""
    count, length, width = channels.shape
    return channels.view(count, length, _HEADS, width // _HEADS).transpose(1, 2)
