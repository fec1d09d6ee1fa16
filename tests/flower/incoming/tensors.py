"""A state dict with tensors of every kind that clients send."""

from __future__ import annotations

import torch

PARAMS = {
    "half": torch.randn(3, 2).half(),
    "single": torch.randn(2, 3, 4),
    "double": torch.randn(5).double(),
    "counter": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "bytes": torch.arange(4, dtype=torch.uint8),
    "none": torch.zeros(0, 3),
    "scalar": torch.tensor(1.5),
}
