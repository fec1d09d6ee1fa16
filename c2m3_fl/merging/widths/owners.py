"""Averages per entry, over the networks that have the units of an entry.

On an axis that produces units, a network without a unit has nothing to say about it: the mean is over the others. On
an axis that reads units, it reads nothing from a unit that it lacks, and its zero counts: then the outputs of the
average are the mean of the networks' outputs, wherever their units agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from c2m3_fl.core.averaging import mean_of_owners, weighted_mean
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.errors import SpecError
from c2m3_fl.merging.align.linear_maps import UNKNOWN, axis_roles
from c2m3_fl.merging.widths.injections import Injection, owned_entries
from c2m3_fl.network.program import Program


def reading_axes(wide: PermutationSpec, program: Program, units: Sequence[Injection]) -> dict[str, int]:
    """The axis of every weight that reads units which some network lacks.

    Parameters
    ----------
    wide : PermutationSpec
        Symmetries of the widest network.
    program : Program
        The widest network, exported.
    units : sequence of mappings of str to Tensor
        Every network's injection.

    Raises
    ------
    SpecError
        When a weight that some network lacks units of both produces and reads them, or its use is not recognised.
    """
    lacking = {name for name in wide.groups if any(bool((own[name] < 0).any()) for own in units)}
    found: dict[str, int] = {}
    for name, roles in axis_roles(wide, program).items():
        lacked = {group for _, segment in wide.tensors[name].segments for group in segment.groups} & lacking
        if not lacked:
            continue
        if len(roles) > 1 or UNKNOWN in roles:
            raise SpecError(
                f"{name!r} both produces and reads units of {sorted(lacked)}, or its use is not recognised, so its "
                "entries have no mean where a network lacks units: give all networks the same width there"
            )
        axis = next(iter(roles), None)
        if axis is not None:
            found[name] = axis
    return found


def average(
    specs: Sequence[PermutationSpec],
    wide: PermutationSpec,
    units: Sequence[Injection],
    carried: Sequence[Params],
    weights: Tensor,
    reads: Mapping[str, int],
) -> dict[str, Tensor]:
    """Average networks of different widths, entry by entry; an entry that none of them owns is zero.

    Parameters
    ----------
    specs : sequence of PermutationSpec
        Symmetries of each network.
    wide : PermutationSpec
        Symmetries of the average.
    units : sequence of mappings of str to Tensor
        Each network's injection.
    carried : sequence of mappings of str to Tensor
        The networks' state dicts, carried into the average's widths by these injections.
    weights : Tensor of float64, shape (networks,)
        Averaging weights.
    reads : mapping of str to int
        The axis of every weight that reads units: see `reading_axes`.
    """
    merged: dict[str, Tensor] = {}
    for name, tensor in wide.tensors.items():
        values = [params[name] for params in carried]
        if not any(tensor.axes) or not torch.is_floating_point(values[0]):
            merged |= weighted_mean([{name: value} for value in values], weights)
            continue
        owned = [
            owned_entries(name, spec, wide, own, ignore=reads.get(name)) for spec, own in zip(specs, units, strict=True)
        ]
        merged[name] = mean_of_owners(values, weights.tolist(), owned)
    return merged
