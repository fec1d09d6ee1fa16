"""Parameters and inputs without accidental regularities, which would hide a wrong permutation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from c2m3_fl.core.spec import Params
from c2m3_fl.network.calibration import Inputs


def generic(
    params: Params,
    buffers: Collection[str],
    generator: torch.Generator,
    first_name: Mapping[str, str],
    *,
    varied: bool = True,
) -> dict[str, Tensor]:
    """Params with the same signs, without regularities.

    Zeros (gates, heads, adapters), ones (scales), copies and identities would make wrong permutations look right, and
    so would entries that are not finite.

    Parameters
    ----------
    params : mapping of str to Tensor
        A state dict; not mutated.
    buffers : collection of str
        Names of the buffers: only those that are constant are randomised.
    generator : torch.Generator
        Source of the random numbers.
    first_name : mapping of str to str
        The first name of every tied tensor.
    varied : bool
        Whether to vary parameters that are not constant but regular, such as copies and identities.
    """
    result: dict[str, Tensor] = {}
    for name, value in params.items():
        first = first_name.get(name, name)
        if first in result:
            result[name] = result[first]
        elif not value.is_floating_point() or value.numel() == 0:
            result[name] = value
        else:
            result[name] = _generic(value, generator, parameter=name not in buffers, varied=varied)
    return result


def _generic(value: Tensor, generator: torch.Generator, *, parameter: bool, varied: bool) -> Tensor:
    if not parameter and bool((~value.isfinite()).all(-1).any()):
        return value  # a mask
    if parameter and not value.sum().isfinite():  # one pass; a sum that overflows costs nothing but a second one
        value = torch.where(value.isfinite(), value, 0.0)
    if bool((value == value.flatten()[0]).all()):
        scalar = value.numel() == 1
        if scalar and (not parameter or float(value) != 0.0):
            return value
        return _spread(value, generator)
    if parameter and varied and _regular(value):
        factor = 0.5 + torch.rand(value.shape, generator=generator).to(value)
        noise = torch.randn(value.shape, generator=generator).to(value) * float(value.pow(2).mean()) ** 0.5
        value = torch.where(value == 0, noise, value * factor)
    return value


def _regular(value: Tensor) -> bool:
    """Whether slices along some axis have the same sum: copies, rows of zeros, the rows of an identity."""
    half = (value.ndim + 1) // 2
    leading, trailing = list(range(half)), list(range(half, value.ndim))
    parts = [value.sum(trailing), value.sum(leading)] if trailing else [value]  # two passes, however many axes
    for part in parts:
        for dim in range(part.ndim):
            others = [other for other in range(part.ndim) if other != dim]
            sums = part.sum(others) if others else part
            if bool((sums.sort().values.diff() == 0).any()):
                return True
    return False


def _spread(value: Tensor, generator: torch.Generator) -> Tensor:
    if float(value.flatten()[0]) != 0.0 or value.numel() == 1:
        size: Tensor = 0.5 + torch.rand(value.shape, generator=generator)
        return value.sign().masked_fill(value == 0, 1.0) * size.to(value)
    fan_in = max(1, value[0].numel()) if value.ndim > 1 else 4
    noise: Tensor = torch.randn(value.shape, generator=generator) / fan_in**0.5
    return noise.to(value)


def generic_inputs(inputs: Inputs, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """The same inputs, in a precision; constant ones are drawn from the normal distribution."""

    def cast(value: Any) -> Any:  # noqa: ANN401  # inputs may hold anything
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu()
        if not value.is_floating_point():
            return value
        if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
            value = torch.randn(value.shape, generator=generator)  # constant inputs would hide errors
        return value.to(dtype)

    found: Inputs = pytree.tree_map(cast, inputs)
    return found
