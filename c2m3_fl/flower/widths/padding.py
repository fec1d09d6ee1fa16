"""Networks of a narrower width as networks of the model's width, with dead units: what clients run for a refit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from c2m3_fl.core.permutation import identity
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.widths.injections import Carrier, Injection, injection, owned_entries
from c2m3_fl.merging.widths.networks import Network
from c2m3_fl.network.calls import tensors_in
from c2m3_fl.network.operators import Kind
from c2m3_fl.network.program import Walk
from c2m3_fl.symmetry.generic import generic, generic_inputs

_EQUAL = 1e-3  # distance of outputs, relative to the largest, that rounding in float32 may cause


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
    example, generator = narrow.held.example, torch.Generator().manual_seed(0)
    drawn = [generic_inputs(((each,), {}), each.dtype, generator)[0][0] for each in example.inputs]
    batch = replace(example, inputs=tuple(drawn))
    with torch.no_grad():
        found, expected = (
            [each for each in tensors_in(Walk(network.held.program, state, batch).finish()) if each.is_floating_point()]
            for network, state in ((wide, padded), (narrow, params))
        )
    return all(
        torch.allclose(one, two, rtol=0, atol=_EQUAL * float(two.abs().max()), equal_nan=True)
        for one, two in zip(found, expected, strict=True)
    )


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
        params = generic(narrow.held.model.state_dict(), buffers, torch.Generator().manual_seed(1), {})
        units = injection(narrow.spec, wide.spec, identity(wide.spec))
        padded = Padding(narrow.spec, wide.spec, units)(params, wide.held.model.state_dict())
        if not computes_alike(wide, narrow, padded, params):
            norms = [each.module for each in wide.held.program.operators if each.kind is Kind.NORM]
            cause = f" ({', '.join(norms)} divide by numbers that depend on the width)" if norms else ""
            raise ConfigError(
                f"recalibrate is {asked!r}, for which clients run networks of all widths padded with dead units, and "
                f"{narrow.name} then computes something else{cause}: pass calibration data and 'refit' instead"
            )
