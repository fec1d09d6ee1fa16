"""How much two runs of a network differ, and which groups are to blame."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from c2m3_fl.symmetry.replay import Replayed


def change(base: Replayed, other: Replayed) -> float:
    """Largest relative difference of the outputs of two replays and of the prints inside them."""
    if base.prints.keys() != other.prints.keys():
        return float("inf")
    prints = max((abs(value - other.prints[key]) for key, value in base.prints.items()), default=0.0)
    return max(prints, difference(base.outputs, other.outputs))


def guilty(bad: Callable[[list[str]], bool], groups: list[str]) -> list[str]:
    """The groups that fail, by bisection. Of groups that fail only together, the first half."""
    if not groups or not bad(groups):
        return []
    if len(groups) == 1:
        return groups
    half = len(groups) // 2
    return guilty(bad, groups[:half]) + guilty(bad, groups[half:]) or groups[:half]


def tells(output: Tensor) -> bool:
    """Whether an output would show a change."""
    return not output.is_floating_point() or bool((output.isfinite() & (output != 0)).any())


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest relative difference of corresponding tensors; infinite where only one of two entries is finite."""
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not a.is_floating_point():
            worst = max(worst, float((a != b).any()))
        elif not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        elif a.numel():
            a, b = a.double().nan_to_num(0, 0, 0), b.double().nan_to_num(0, 0, 0)
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)))
    return worst
