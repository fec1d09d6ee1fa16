"""Networks of a narrower width as networks of the model's width, with dead units: what clients run for a refit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from c2m3_fl.core.permutation import identity
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.merging.widths.injections import Carrier, Injection, injection, owned_entries
from c2m3_fl.merging.widths.networks import Network
from c2m3_fl.network.calls import tensors_in
from c2m3_fl.network.operators import Kind
from c2m3_fl.network.program import Walk
from c2m3_fl.symmetry.generic import generic, generic_inputs

# Distance of outputs, relative to the largest, that rounding may cause: in double precision, up to steps for which a
# network chooses single precision, and of a network that insists on the precision that it has.
_EQUAL, _COARSE = 1e-5, 1e-3


def placed(spec: PermutationSpec, units: Injection) -> dict[str, Tensor]:
    """For every unit of the model the unit of a narrower width that it is, or -1.

    Parameters
    ----------
    spec : PermutationSpec
        Symmetries of the model.
    units : mapping of str to Tensor
        For every unit of the narrower width the unit of the model.
    """
    found = {}
    for name, own in units.items():
        found[name] = torch.full((spec.groups[name].size,), -1)
        found[name][own] = torch.arange(len(own))
    return found


class Padding:
    """Pads networks of one width: entries that they lack are zero, in buffers those of another network.

    Parameters
    ----------
    narrow, wide : PermutationSpec
        Symmetries of the network and of the model.
    units : mapping of str to Tensor
        For every unit of the model the network's unit that it is, or -1.
    """

    def __init__(self, narrow: PermutationSpec, wide: PermutationSpec, units: Injection) -> None:
        self._carry = Carrier(narrow, wide, units)
        self._owned = {
            name: owned_entries(name, narrow, wide, units)
            for name, tensor in wide.tensors.items()
            if tensor.buffer and any(tensor.axes)
        }

    def __call__(self, params: Params, missing: Params) -> dict[str, Tensor]:
        """A network of the model's width.

        Parameters
        ----------
        params : mapping of str to Tensor
            State dict of the network; not mutated.
        missing : mapping of str to Tensor
            State dict of the model's width, whose buffers fill in.
        """
        found = self._carry(params)
        for name, own in self._owned.items():
            found[name] = torch.where(own, found[name], missing[name].to(found[name].dtype))
        return found


def computes_alike(wide: Network, narrow: Network, padded: Params, params: Params) -> bool:
    """Whether a network of the model's width gives the outputs of one of a narrower width, on generic inputs.

    Parameters
    ----------
    wide, narrow : Network
        The model and the narrower network.
    padded, params : mapping of str to Tensor
        A state dict of each.
    """
    try:
        return all(map(_close, *(_outputs(*pair, torch.float64) for pair in ((wide, padded), (narrow, params)))))
    except CalibrationError:  # a network that insists on the precision that it has
        pairs = [_outputs(*pair, None) for pair in ((wide, padded), (narrow, params))]
        return all(_close(one, two, _COARSE) for one, two in zip(*pairs, strict=True))


def _outputs(network: Network, params: Params, dtype: torch.dtype | None) -> list[Tensor]:
    """What a network of some width gives on generic inputs; with None in its own precision."""

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    program, example = network.held.program, network.held.example
    generator = torch.Generator().manual_seed(0)
    drawn = [generic_inputs(((each,), {}), dtype or each.dtype, generator)[0][0] for each in example.inputs]
    program = replace(program, constants={name: cast(value) for name, value in program.constants.items()})
    with torch.no_grad():
        walk = Walk(
            program, {name: cast(value) for name, value in params.items()}, replace(example, inputs=tuple(drawn))
        )
        return [each.double() for each in tensors_in(walk.finish()) if each.is_floating_point()]


def _close(found: Tensor, expected: Tensor, tolerance: float = _EQUAL) -> bool:
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return False
    return torch.allclose(found[finite], expected[finite], rtol=0, atol=tolerance * _largest(expected[finite]))


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def check_padding(networks: Sequence[Network], asked: object) -> None:
    """Raise `ConfigError` unless every narrower network, padded to the model's width, computes what it computes.

    Parameters
    ----------
    networks : sequence of Network
        The model and the narrower ones.
    asked : object
        What needs it, as the user gave it.
    """
    wide, *others = networks
    for narrow in others:
        buffers = {name for name, _ in narrow.held.model.named_buffers(remove_duplicate=False)}
        generator = torch.Generator().manual_seed(1)
        params = _with_gains(generic(narrow.held.model.state_dict(), buffers, generator, {}), buffers, generator)
        units = injection(narrow.spec, wide.spec, identity(wide.spec))
        padded = Padding(narrow.spec, wide.spec, units)(params, wide.held.model.state_dict())
        norms = [each for each in wide.held.program.operators if each.kind is Kind.NORM]
        shapes = [[network.spec.tensors[each.weight].shape for network in (wide, narrow)] for each in norms]
        over_units = any(
            each.layout.channel == -1 and one != two for each, (one, two) in zip(norms, shapes, strict=True)
        )
        if over_units or not computes_alike(wide, narrow, padded, params):
            names = ", ".join(each.module for each in norms)
            cause = f" ({names} divide by numbers that depend on the width)" if norms else ""
            raise ConfigError(
                f"recalibrate is {asked!r}, for which clients run networks of all widths padded with dead units, and "
                f"{narrow.name} then computes something else{cause}: pass calibration data and 'refit' instead"
            )


def _with_gains(params: Params, buffers: Collection[str], generator: torch.Generator) -> dict[str, Tensor]:
    """The same parameters with single numbers of order one: a small gain would hide what it multiplies."""

    def drawn(value: Tensor) -> Tensor:
        return value.sign() * (0.5 + torch.rand(value.shape, generator=generator)).to(value)

    return {
        name: drawn(value) if value.numel() == 1 and value.is_floating_point() and name not in buffers else value
        for name, value in params.items()
    }
