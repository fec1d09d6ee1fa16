"""Proof by numbers: a network with permuted units must compute the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from c2m3_fl.core.permutation import Permutation, apply, identity, random
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.models.exporting import Inputs, mode, plain_attention

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative; what rounding alone stays below


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
        Whether to run in training mode, with dropout off.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, *, seed: int = 0, training: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.training = training
        self.dtype = torch.float64
        self._module = _private(model, self.dtype)
        self._inputs = _cast(inputs, self.dtype, self.generator)
        self.params = generic(_tensors(self._module.state_dict()), self.generator, tied=_ties(self._module))
        try:
            self._expected = self._run(self.params)
        except (RuntimeError, TypeError):  # a constant or a cast inside the network insists on single precision
            self.dtype = torch.float32
            self._module = _private(model, self.dtype)
            self._inputs = _cast(inputs, self.dtype, self.generator)
            self.params = {
                name: value.to(_tensors(self._module.state_dict())[name].dtype) for name, value in self.params.items()
            }
            self._expected = self._run(self.params)

    @property
    def tolerance(self) -> float:
        """Largest relative error that rounding explains."""
        return TOLERANCE[self.dtype]

    def error(self, spec: PermutationSpec, chosen: Collection[str] | None = None) -> float:
        """Largest relative change of any output under a random permutation of the `chosen` groups (all of them)."""
        perm = random(spec, self.generator)
        if chosen is not None:
            perm = restrict(spec, perm, chosen)
        return _difference(self._expected, self._run(apply(spec, perm, self.params)))

    def _run(self, params: Params) -> list[Tensor]:
        self._module.load_state_dict({**self._module.state_dict(), **params})
        args, kwargs = self._inputs
        torch_state = torch.random.get_rng_state()
        try:
            torch.manual_seed(0)
            with torch.no_grad(), plain_attention(), mode(self._module, training=self.training):
                out = self._module(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        finally:
            torch.random.set_rng_state(torch_state)
        return [leaf.detach().clone() for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def restrict(spec: PermutationSpec, perm: Permutation, chosen: Collection[str]) -> dict[str, Tensor]:
    """The part of a permutation that moves only the `chosen` groups; units of others follow their blocks."""
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
    """The groups that fail, by bisection; the first half of those that only fail together."""
    if not groups or not bad(groups):
        return []
    if len(groups) == 1:
        return groups
    half = len(groups) // 2
    return guilty(bad, groups[:half]) + guilty(bad, groups[half:]) or groups[:half]


def generic(params: Params, generator: torch.Generator, *, tied: Mapping[str, str]) -> dict[str, Tensor]:
    """The same params, with constant tensors and statistics randomised so that nothing hides behind a zero or a one."""
    result: dict[str, Tensor] = {}
    for name, value in params.items():
        if name in tied and tied[name] in result:
            result[name] = result[tied[name]]
        elif not value.is_floating_point() or value.numel() < 1:
            result[name] = value
        elif value.ndim and bool((value == value.flatten()[0]).all()):
            result[name] = _spread(value, generator)
        else:
            result[name] = value
    return result


def _spread(value: Tensor, generator: torch.Generator) -> Tensor:
    if float(value.flatten()[0]) != 0.0:
        size: Tensor = 0.5 + torch.rand(value.shape, generator=generator)
        return value.sign() * size.to(value)
    fan_in = max(1, value[0].numel()) if value.ndim > 1 else 4
    return (torch.randn(value.shape, generator=generator) / fan_in**0.5).to(value)


def _private(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    module = copy.deepcopy(model).to(device="cpu", dtype=dtype)
    for child in module.modules():
        if isinstance(child, nn.modules.dropout._DropoutNd):
            child.p = 0.0
    return module


def _ties(module: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(value), name) for name, value in named}


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}


def _cast(inputs: Inputs, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    def cast(value: Any) -> Any:  # noqa: ANN401
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        value = value.detach().cpu()
        if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
            value = torch.randn(value.shape, generator=generator)  # blank examples would hide what pixels are for
        return value.to(dtype)

    found: Inputs = pytree.tree_map(cast, inputs)
    return found


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not a.is_floating_point():
            worst = max(worst, float((a != b).any()))
            continue
        if not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        a, b = a.double().nan_to_num(0, 0, 0), b.double().nan_to_num(0, 0, 0)
        if a.numel():
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)))
    return worst
