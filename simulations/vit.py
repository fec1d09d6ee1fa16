"""A small vision transformer.

It is ordinary ``torch.nn`` code that does not depend on this package.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulations.language_models import Block

_BLOCKS = 4
_PATCH = 4  # pixels of the side of a patch
_SPREAD = 0.02  # standard deviation of positions


class Vit(nn.Module):
    """ViT (Dosovitskiy et al. 2021) with 4 blocks of 4 heads; the mean over the patches of 4×4 pixels is classified.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of an image.
    width : int
        Channels of the stream, a multiple of 4.
    classes : int
        Number of classes.
    """

    def __init__(self, shape: tuple[int, int, int], width: int, classes: int) -> None:
        super().__init__()
        channels, height, breadth = shape
        self.patches = nn.Conv2d(channels, width, _PATCH, stride=_PATCH)
        self.positions = nn.Parameter(_SPREAD * torch.randn((height // _PATCH) * (breadth // _PATCH), width))
        self.blocks = nn.Sequential(*(Block(width, is_causal=False) for _ in range(_BLOCKS)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        stream = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(stream)).mean(1))
        return logits
