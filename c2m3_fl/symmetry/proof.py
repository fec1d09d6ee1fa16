"""Numerical proof: a network with permuted units must compute the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from c2m3_fl.core.permutation import Permutation, apply, identity, random
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.network.calibration import Inputs
from c2m3_fl.network.calls import tensors_in
from c2m3_fl.network.copying import in_precision, private_copy
from c2m3_fl.network.exporting import aliases, mode, plain_attention, require_runs

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative; rounding alone stays below


class Prover:
    """A private copy of a network with generic parameters, in double precision where the network allows it.

    Parameters
    ----------
    model : nn.Module
        The network; not mutated.
    inputs : tuple
        Positional and keyword arguments of one call.
    seed : int
        Seed of parameters and permutations.
    training : bool
        Whether to run in training mode, without dropout.

    Raises
    ------
    TraceError
        When the network cannot be called with the inputs.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, *, seed: int = 0, training: bool = False) -> None:
        self._training = training
        self._first_name = aliases(model)
        try:
            self._prepare(model, inputs, torch.float64, seed)
        except Exception:  # a constant or a cast inside the network requires single precision
            with mode(model, training=training):
                require_runs(model, inputs)
            self._prepare(model, inputs, torch.float32, seed)

    def _prepare(self, model: nn.Module, inputs: Inputs, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        self._module = in_precision(private_copy(model).cpu(), dtype)
        self._inputs = _cast(inputs, dtype, self.generator)
        state: Mapping[str, Any] = self._module.state_dict()
        own = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self._params = generic(own, self.generator, self._first_name)
        self._expected = self._run(self._params)

    @property
    def tolerance(self) -> float:
        """Largest relative error that rounding explains."""
        return TOLERANCE[self.dtype]

    def error(self, spec: PermutationSpec, chosen: Collection[str] | None = None) -> float:
        """Largest relative change of any output when a random permutation moves each of the `chosen` groups (all).

        Infinite if all outputs are zero or not finite: then no change would show.
        """
        if not any(_tells(leaf) for leaf in self._expected):
            return float("inf")
        perm = stirring(spec, self.generator)
        if chosen is not None:
            perm = restrict(spec, perm, chosen)
        return difference(self._expected, self._run(apply(spec, perm, self._params)))

    def _run(self, params: Params) -> list[Tensor]:
        first = {name: value.clone() if value.ndim == 0 else value for name, value in params.items()}
        first = {name: value for name, value in first.items() if self._first_name.get(name, name) == name}
        args, kwargs = copy.deepcopy(self._inputs)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), plain_attention():
            torch.manual_seed(0)
            with mode(self._module, training=self._training):
                out = functional_call(self._module, first, args, kwargs)
        return [leaf.detach().clone() for leaf in tensors_in(out)]


def stirring(spec: PermutationSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """A random permutation that is not the identity on any group, however small."""
    perm = random(spec, generator)
    for name in spec.roots:
        if torch.equal(perm[name], torch.arange(len(perm[name]))):
            perm[name] = perm[name].roll(1)
    for name, group in spec.groups.items():
        if group.parent is not None:
            outer = perm[group.parent]
            inner = (perm[name] % (group.size // len(outer))).reshape(len(outer), -1)
            if bool((inner == torch.arange(inner.shape[1])).all()):
                inner = inner.roll(1, dims=1)
            perm[name] = (outer[:, None] * inner.shape[1] + inner).reshape(-1)
    return perm


def restrict(spec: PermutationSpec, perm: Permutation, chosen: Collection[str]) -> dict[str, Tensor]:
    """The part of a permutation that moves the `chosen` groups only; other nested units follow their blocks."""
    result = identity(spec)
    for name in spec.roots:
        if name in chosen:
            result[name] = perm[name]
    for name, group in spec.groups.items():
        if group.parent is None:
            continue
        block = group.size // spec.groups[group.parent].size
        outer = result[group.parent]
        inner = (perm[name] % block).reshape(-1, block) if name in chosen else torch.arange(block)
        result[name] = (outer[:, None] * block + inner).reshape(-1)
    return result


def guilty(bad: Callable[[list[str]], bool], groups: list[str]) -> list[str]:
    """The groups that fail, by bisection. Of groups that fail only together, the first half."""
    if not groups or not bad(groups):
        return []
    if len(groups) == 1:
        return groups
    half = len(groups) // 2
    return guilty(bad, groups[:half]) + guilty(bad, groups[half:]) or groups[:half]


def generic(params: Params, generator: torch.Generator, first_name: Mapping[str, str]) -> dict[str, Tensor]:
    """The same params with constant tensors randomised: zeros (heads) or ones (scales) would hide an error."""
    result: dict[str, Tensor] = {}
    for name, value in params.items():
        first = first_name.get(name, name)
        if first in result:
            result[name] = result[first]
        elif value.is_floating_point() and value.numel() > 1 and bool((value == value.flatten()[0]).all()):
            result[name] = _spread(value, generator)
        else:
            result[name] = value
    return result


def _spread(value: Tensor, generator: torch.Generator) -> Tensor:
    if float(value.flatten()[0]) != 0.0:
        size: Tensor = 0.5 + torch.rand(value.shape, generator=generator)
        return value.sign() * size.to(value)
    fan_in = max(1, value[0].numel()) if value.ndim > 1 else 4
    noise: Tensor = torch.randn(value.shape, generator=generator) / fan_in**0.5
    return noise.to(value)


def _cast(inputs: Inputs, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
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


def _tells(output: Tensor) -> bool:
    """Whether an output would show a change."""
    return not output.is_floating_point() or bool((output.isfinite() & (output != 0)).any())


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest relative difference of corresponding tensors; infinite where only one of two entries is finite."""
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if not a.is_floating_point():
            worst = max(worst, float((a != b).any()))
        elif not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        elif a.numel():
            a, b = a.double().nan_to_num(0, 0, 0), b.double().nan_to_num(0, 0, 0)
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)))
    return worst
