"""Weighted means of state dicts, with an explicit rule for every dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ParamsError, WeightsError


def normalise_weights(weights: Sequence[float] | Tensor | None, count: int) -> Tensor:
    """Averaging weights that sum to one.

    Parameters
    ----------
    weights : sequence of float, optional
        One non-negative number per node, not all zero; equal weights by default.
    count : int
        Number of nodes.

    Returns
    -------
    Tensor of float64, shape (count,)

    Raises
    ------
    WeightsError
        When the weights are no numbers, negative, not finite, all zero, or not `count` many.
    """
    if weights is None:
        return torch.full((count,), 1.0 / count, dtype=torch.float64)
    if isinstance(weights, Mapping):
        raise WeightsError("weights are a mapping, expected one number per node, in the order of the nodes")
    values = _numbers(weights)
    if len(values) != count:
        raise WeightsError(f"weights: got {len(values)}, expected one for each of the {count} nodes")
    for index, value in enumerate(values):
        if not math.isfinite(value) or value < 0:
            raise WeightsError(f"weights[{index}] is {value}, expected a finite number that is not negative")
    if max(values) == 0:
        raise WeightsError("weights are all zero; give at least one node a positive weight")
    scaled = [value / max(values) for value in values]  # the plain sum of large weights could overflow
    total = math.fsum(scaled)
    return torch.tensor([value / total for value in scaled], dtype=torch.float64)


def _numbers(weights: Sequence[float] | Tensor) -> list[float]:
    if isinstance(weights, Tensor) and weights.ndim != 1:
        raise WeightsError(f"weights have shape {tuple(weights.shape)}, expected one number per node")
    found: list[float] = []
    try:
        for weight in weights:
            if isinstance(weight, str):
                raise TypeError("text is no number")
            found.append(float(weight))
    except (TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"weights[{len(found)}] is no number, expected one per node: {error}") from error
    return found


def weighted_mean(nodes: Sequence[Params], weights: Sequence[float] | Tensor | None = None) -> dict[str, Tensor]:
    """Mean of state dicts: floating tensors are averaged, integer and boolean ones take the largest value.

    Floating tensors accumulate in float64 and keep the first node's dtype, as differences from the node of the
    largest weight, so the mean of identical nodes is that node bit for bit. Counters and masks have no mean:
    they take the elementwise maximum and keep their dtype.

    Parameters
    ----------
    nodes : sequence of mappings of str to Tensor
        State dicts with the same keys and shapes; not mutated.
    weights : sequence of float, optional
        See `normalise_weights`.

    Raises
    ------
    ParamsError
        When there is no node, or keys or shapes differ.
    WeightsError
        See `normalise_weights`.
    """
    if not nodes:
        raise ParamsError("nodes: got none, expected at least one state dict to average")
    share = normalise_weights(weights, len(nodes)).tolist()
    for index, node in enumerate(nodes[1:], start=1):
        if node.keys() != nodes[0].keys():
            differing = sorted(node.keys() ^ nodes[0].keys())
            raise ParamsError(f"node {index}: keys differ from node 0's in {differing[:5]}")
    return {name: _mean(name, [node[name] for node in nodes], share) for name in nodes[0]}


def mean_from_first(values: Sequence[Tensor], share: Sequence[float]) -> Tensor:
    """Weighted mean as differences from the first value, in the values' dtype: exact where all values are equal.

    Parameters
    ----------
    values : sequence of Tensor
        At least one; not mutated.
    share : sequence of float
        One weight per value; the weights sum to one.
    """
    total = torch.zeros_like(values[0])
    for value, weight in zip(values[1:], share[1:], strict=True):
        total += weight * (value - values[0])
    return values[0] + total


def mean_of_owners(values: Sequence[Tensor], share: Sequence[float], owned: Sequence[Tensor]) -> Tensor:
    """Weighted mean of every entry over the values that own it; zero where none does.

    Parameters
    ----------
    values : sequence of Tensor
        At least one, all of one shape; not mutated.
    share : sequence of float
        One weight per value.
    owned : sequence of Tensor of bool
        Whether a value owns an entry; each broadcasts to the shape of the values.
    """
    first = values[0]
    wide = torch.promote_types(first.dtype, torch.float64)
    total = torch.zeros_like(first, dtype=wide)
    weight = torch.zeros((), dtype=torch.float64, device=first.device)
    for value, own_share, mask in zip(values, share, owned, strict=True):
        own = own_share * mask.to(device=first.device, dtype=torch.float64)
        total = total + own * value.to(device=first.device, dtype=wide)
        weight = weight + own
    return torch.where(weight > 0, total / torch.where(weight > 0, weight, 1.0), 0.0).to(first.dtype)


def _mean(name: str, values: list[Tensor], share: list[float]) -> Tensor:
    first = values[0]
    for index, value in enumerate(values):
        if value.shape != first.shape:
            raise ParamsError(f"node {index}: {name!r} has shape {tuple(value.shape)}, expected {tuple(first.shape)}")
    if not (torch.is_floating_point(first) or torch.is_complex(first)):
        return _maximum(values)
    wide = torch.promote_types(first.dtype, torch.float64)
    anchor = max(range(len(values)), key=share.__getitem__)
    origin = values[anchor].to(device=first.device, dtype=wide)
    mean = torch.zeros_like(origin)
    for index, value in enumerate(values):
        if index != anchor and share[index] > 0:
            mean.add_(value.to(device=first.device, dtype=wide) - origin, alpha=share[index])
    return mean.add_(origin).to(first.dtype)


def _maximum(values: list[Tensor]) -> Tensor:
    first = values[0]
    largest = first.clone()
    for value in values[1:]:
        largest = torch.maximum(largest, value.to(device=first.device, dtype=first.dtype))
    return largest
