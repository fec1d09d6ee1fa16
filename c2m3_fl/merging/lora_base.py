"""The weights that adapters add to, found in a network and proven on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.lora import FACTOR, check_adapters, factors_of
from c2m3_fl.network.calibration import Batch
from c2m3_fl.network.calls import tensors_in
from c2m3_fl.network.exporting import mode

_ROUNDING = 1e-2  # of what the adapters add, through layers with random adapters in single precision


@dataclass(frozen=True)
class Base:
    """The weight that an adapter adds to.

    Attributes
    ----------
    name : str
        Its name.
    scale : float
        By which the product is multiplied.
    transposed : bool
        Whether the product is added with rows and columns exchanged, as that of an embedding.
    """

    name: str
    scale: float = 1.0
    transposed: bool = False

    def plus(self, weight: Tensor, product: Tensor) -> Tensor:
        """The weight with a product of the adapter's kind added."""
        return weight + self.scale * (product.T if self.transposed else product).reshape(weight.shape).to(weight.dtype)


def find_bases(model: nn.Module, example: Batch) -> dict[str, Base]:
    """The weight that every adapter of a network adds to, by A's name; proven on random inputs like the example.

    It lies in the module of the adapter and has the product's shape; the scale is the module's ``scaling``, as PEFT
    has it, else 1.

    Parameters
    ----------
    model : nn.Module
        The network; not mutated.
    example : Batch
        Inputs that it takes.

    Raises
    ------
    ConfigError
        Where there are no such weights, or adding the products to them is not what the adapters do.
    """
    state = {name: value.detach() for name, value in model.state_dict().items()}
    pairs = check_adapters(state)
    bases = {down: _base_of(model, state, down, up) for down, up in pairs}
    draws = torch.Generator().manual_seed(0)
    random = {name: torch.randn(state[name].shape, generator=draws).to(state[name]) for pair in pairs for name in pair}
    zero = {up: torch.zeros_like(state[up]) for _, up in pairs}
    folded = {}
    for down, up in pairs:
        factors, base = factors_of(random, down, up), bases[down]
        folded[base.name] = base.plus(state[base.name], factors.left @ factors.right)
    runs = ({**state, **random, **zero}, {**state, **random}, {**state, **random, **zero, **folded})
    without, adapted, added = (_outputs(model, params, example) for params in runs)
    size = max((float((one - other).abs().max()) for one, other in zip(adapted, without, strict=True)), default=0.0)
    error = max((float((one - other).abs().max()) for one, other in zip(adapted, added, strict=True)), default=0.0)
    if not error <= _ROUNDING * size or size == 0:
        raise ConfigError(
            "adding scaling * B A to "
            f"{[base.name for base in bases.values()][:5]} … is not what the adapters of this network do: average them "
            "with lora='exact', which does not change the base"
        )
    return bases


def _base_of(model: nn.Module, state: Params, down: str, up: str) -> Base:
    found = FACTOR.search(down)
    assert found is not None  # of a pair
    path, adapter = down[: found.start()].rstrip("."), down[found.end() :].lstrip(".").partition(".")[0]
    module = model.get_submodule(path)
    rows, columns = len(state[up]), state[down].flatten(1).shape[1]
    shapes = {
        name: tuple(value.flatten(1).shape)
        for name, value in state.items()
        if name.startswith(f"{path}." if path else "") and value.ndim > 1 and not FACTOR.search(name)
    }
    fitting = [name for name, shape in shapes.items() if shape in ((rows, columns), (columns, rows))]
    if len(fitting) != 1:
        raise ConfigError(
            f"the base of {down!r} is not found: in {path!r}, {fitting or 'no'} weights have the shape of its product, "
            f"({rows}, {columns}); average with lora='exact', which does not change the base"
        )
    scaling = getattr(module, "scaling", 1.0)
    turned = "embedding" in found[1] or bool(getattr(module, "fan_in_fan_out", False))
    return Base(
        fitting[0],
        float(scaling.get(adapter, 1.0) if isinstance(scaling, Mapping) else scaling),
        shapes[fitting[0]] != (rows, columns) or (rows == columns and turned),
    )


def _outputs(model: nn.Module, params: Params, example: Batch) -> list[Tensor]:
    draws = torch.Generator().manual_seed(1)
    args, kwargs = tree_map(
        lambda value: (
            torch.randn(value.shape, generator=draws).to(value)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
        ),
        example.call,
    )
    with mode(model, training=False), torch.no_grad():
        outputs = tensors_in(functional_call(model, dict(params), args, kwargs, tie_weights=False))
        return [value for value in outputs if value.is_floating_point()]
