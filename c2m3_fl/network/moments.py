"""Streaming channel moments: mean and standard deviation of every channel, over any number of batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and summed squared deviation of every channel, in float64.

    Moments form a monoid: ``combine`` is associative and `Moments.empty` its neutral element, so batches
    may be measured separately and pooled (Chan, Golub and LeVeque 1979) without keeping any activation.

    Attributes
    ----------
    count : int
        Number of values seen per channel.
    mean : Tensor of float64, shape (channels,)
        Mean of every channel.
    deviation : Tensor of float64, shape (channels,)
        Sum of squared deviations from the mean.
    """

    count: int
    mean: Tensor
    deviation: Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device | str = "cpu") -> Moments:
        """Moments of no values."""
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros)

    @classmethod
    def of(cls, values: Tensor, axes: tuple[int, ...]) -> Moments:
        """Moments of one tensor whose channels are the coordinates of `axes`, taken together in order.

        A first mean, rounded, is subtracted before squaring, so that a large offset does not cancel the
        spread; the rounding error of that mean is corrected in float64.
        """
        channel = sorted(axis % values.ndim for axis in axes)
        pooled = [axis for axis in range(values.ndim) if axis not in channel]
        channels = torch.Size(values.shape[axis] for axis in channel).numel()
        count = values.numel() // max(1, channels)
        wide = values if values.dtype in (torch.float32, torch.float64) else values.float()
        if not pooled:
            mean = wide.reshape(-1).double()
            return cls(1, mean, torch.zeros_like(mean))
        pivot = wide.mean(pooled, keepdim=True)
        centred = wide - pivot
        rest = centred.sum(pooled, dtype=torch.float64).reshape(-1) / count
        squares = centred.square().sum(pooled, dtype=torch.float64).reshape(-1)
        return cls(count, pivot.reshape(-1).double() + rest, (squares - count * rest.square()).clamp_min(0))

    def combine(self, other: Moments) -> Moments:
        """Moments of both sets of values together."""
        if not self.count:
            return other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        deviation = self.deviation + other.deviation + delta.square() * (self.count * other.count / count)
        return Moments(count, mean, deviation)

    @property
    def variance(self) -> Tensor:
        """Population variance of every channel."""
        return self.deviation / max(1, self.count)

    @property
    def unbiased_variance(self) -> Tensor:
        """Variance with Bessel's correction, as BatchNorm keeps it in its running statistics."""
        return self.deviation / max(1, self.count - 1)

    @property
    def std(self) -> Tensor:
        """Population standard deviation of every channel."""
        return self.variance.sqrt()
