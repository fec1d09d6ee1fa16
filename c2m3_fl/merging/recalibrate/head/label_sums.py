"""Sums of a last layer's inputs and their labels, which clients send, and their pooling over clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import digest
from c2m3_fl.errors import CalibrationError
from c2m3_fl.merging.recalibrate.outliers import capped
from c2m3_fl.merging.recalibrate.ridge import Sums


@dataclass(frozen=True)
class LabelSums:
    """A client's sums of the last layer's inputs and of their labels, as one-hot targets.

    Attributes
    ----------
    train, held_out : Sums
        Of the examples to fit, and of those held out. `r` is the number of examples per class, `xr` the sum of the
        inputs per class.
    """

    train: Sums
    held_out: Sums

    @property
    def total(self) -> Sums:
        """Of all examples."""
        return self.train.combine(self.held_out)

    @property
    def classes(self) -> Tensor:
        """Number of examples per class, shape (classes,)."""
        return (self.train.r + self.held_out.r)[0]

    @property
    def count(self) -> float:
        """Number of examples."""
        return self.train.count + self.held_out.count

    def combine(self, other: LabelSums) -> LabelSums:
        """Sums over both sets of examples."""
        return LabelSums(self.train.combine(other.train), self.held_out.combine(other.held_out))

    def scaled(self, factor: float) -> LabelSums:
        """The sums of the same examples, each counted `factor` times."""
        return LabelSums(self.train.scaled(factor), self.held_out.scaled(factor))


def one_hot_sums(gram: Tensor, by_class: Tensor, classes: Tensor) -> Sums:
    """Sums of rows and one-hot targets.

    Parameters
    ----------
    gram : Tensor of float64, shape (inputs, inputs)
        Sum of x xᵀ.
    by_class : Tensor of float64, shape (inputs, classes)
        Sum of x per class.
    classes : Tensor, shape (classes,)
        Number of rows per class.
    """
    shares = classes.double()[None]
    return Sums(float(shares.sum()), by_class.sum(1)[None], shares, gram[None], by_class[None], shares)


def write_sums(sums: Sums, part: str) -> dict[str, Tensor]:
    """Sums of one-hot targets as tensors under names that start with `part`; the Gram as its upper triangle."""
    inputs = sums.xx.shape[1]
    upper = torch.triu_indices(inputs, inputs)
    return {
        f"{part}/classes": sums.r[0].round().long(),
        f"{part}/by-class": sums.xr[0],
        f"{part}/gram": sums.xx[0, upper[0], upper[1]],
    }


def read_sums(tensors: Params, part: str) -> Sums:
    """The inverse of `write_sums`."""
    by_class, packed = tensors[f"{part}/by-class"], tensors[f"{part}/gram"]
    upper = torch.triu_indices(len(by_class), len(by_class))
    gram = packed.new_zeros(len(by_class), len(by_class))
    gram[upper[0], upper[1]] = packed
    return one_hot_sums(gram + gram.triu(1).T, by_class, tensors[f"{part}/classes"])


def pool_sums(answers: Sequence[LabelSums], *, equally: bool = False) -> LabelSums:
    """Sums over all clients' examples, bitwise independent of the order of the clients.

    Parameters
    ----------
    answers : sequence of LabelSums
        One per client, at least one.
    equally : bool
        Whether every client counts the same; otherwise as many times as it has examples, but at most ten times
        their median.
    """
    ordered = sorted(answers, key=_content)
    counts = [each.count for each in ordered]
    weights = [1.0] * len(counts) if equally else capped(counts)
    total: LabelSums | None = None
    for each, weight in zip(ordered, weights, strict=True):
        part = each.scaled(weight / each.count)
        total = part if total is None else total.combine(part)
    if total is None:
        raise CalibrationError("label sums: got none, expected those of at least one client")
    return total


def _content(answer: LabelSums) -> str:
    parts = {"train": answer.train, "held-out": answer.held_out}
    return digest({f"{who}/{name}": getattr(part, name) for who, part in parts.items() for name in ("r", "xr", "xx")})
