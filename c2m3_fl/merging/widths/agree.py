"""Whether networks differ in width alone, and which of them is the widest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from c2m3_fl.core.spec import Axis, PermutationSpec, TensorSpec
from c2m3_fl.errors import SpecError

_REMEDY = "networks of different widths must have the same modules, blocks and operators"


def sizes(spec: PermutationSpec) -> dict[str, int]:
    """Units of every group; of a nested group, units of every block."""
    return {
        name: group.size if group.parent is None else group.size // spec.groups[group.parent].size
        for name, group in spec.groups.items()
    }


def fits_into(spec: PermutationSpec, wide: PermutationSpec) -> bool:
    """Whether every group of `wide` has room for the units of `spec`."""
    room = sizes(wide)
    return all(size <= room[name] for name, size in sizes(spec).items())


def widest(specs: Sequence[PermutationSpec]) -> int | None:
    """The first spec that has room for all others; None if there is none."""
    return next((place for place, wide in enumerate(specs) if all(fits_into(each, wide) for each in specs)), None)


def check_alike(specs: Sequence[PermutationSpec], names: Sequence[str]) -> None:
    """Raise `SpecError` unless the specs are equal up to the sizes of their groups.

    Parameters
    ----------
    specs : sequence of PermutationSpec
        The symmetries of each network.
    names : sequence of str
        Names of the networks in the error.

    Raises
    ------
    SpecError
        Naming the first place where the structure of a network differs from the first one's.
    """
    for spec, name in zip(specs[1:], names[1:], strict=True):
        _check_pair(specs[0], spec, f"{name} differs from {names[0]} in more than its width")


def _check_pair(first: PermutationSpec, other: PermutationSpec, what: str) -> None:
    for tensor in first.tensors.keys() ^ other.tensors.keys():
        where = "has" if tensor in other.tensors else "lacks"
        raise SpecError(f"{what}: it {where} the tensor {tensor!r}; {_REMEDY}")
    for name, group in first.groups.items():
        if name in other.groups and group.parent != other.groups[name].parent:
            raise SpecError(
                f"{what}: units of group {name!r} lie in blocks of {other.groups[name].parent!r}, expected "
                f"{group.parent!r}; {_REMEDY}"
            )
    for name in first.tensors:
        _check_tensor(name, first, other, what)


def _check_tensor(name: str, first: PermutationSpec, other: PermutationSpec, what: str) -> None:
    mine, theirs = first.tensors[name], other.tensors[name]
    if len(mine.shape) != len(theirs.shape) or (mine.diagonal > 1) != (theirs.diagonal > 1):
        raise SpecError(f"{what}: {name!r} has shape {theirs.shape}, in the first {mine.shape}; {_REMEDY}")
    for axis, (one, two) in enumerate(zip(mine.axes, theirs.axes, strict=True)):
        if _carried(one) != _carried(two):
            raise SpecError(
                f"{what}: {name!r} axis {axis} carries {_in_words(two)}, in the first {_in_words(one)}; {_REMEDY}, "
                "and more than one unit in every group"
            )
        fixed = [free(tensor, axis) for tensor in (mine, theirs)]
        if fixed[0] != fixed[1]:
            pins = [pin for spec in (first, other) for pin in spec.pins if (pin.tensor, pin.axis) == (name, axis)]
            reason = f" ({pins[0].reason})" if pins else ""
            raise SpecError(
                f"{what}: {name!r} axis {axis} has {fixed[1]} coordinates that may not be permuted{reason}, in the "
                f"first {fixed[0]}; only groups of interchangeable units may differ in size"
            )


def check_constants(models: Sequence[nn.Module], specs: Sequence[PermutationSpec], names: Sequence[str]) -> None:
    """Raise `SpecError` for a buffer that holds another number in each network, such as a scale by the width.

    Statistics of norms are left out, and so are buffers that hold values per unit.

    Parameters
    ----------
    models : sequence of nn.Module
        The networks.
    specs : sequence of PermutationSpec
        The symmetries of each.
    names : sequence of str
        Names of the networks in the error.

    Raises
    ------
    SpecError
        Naming the first such buffer, and its module.
    """
    first = _constants(models[0], specs[0])
    for model, spec, name in zip(models[1:], specs[1:], names[1:], strict=True):
        for key, value in _constants(model, spec).items():
            if key in first and value.shape == first[key].shape and not torch.equal(value, first[key].to(value)):
                raise SpecError(
                    f"the buffer {key!r} is {_shown(value)} in {name}, in {names[0]} {_shown(first[key])}: a constant "
                    "that depends on the width cannot be averaged; give all networks the same one"
                )


def _constants(model: nn.Module, spec: PermutationSpec) -> dict[str, Tensor]:
    """Floating buffers that belong to no norm and hold no values per unit."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, _NormBase):
            continue
        for name, value in module.named_buffers(prefix=path, recurse=False):
            tensor = spec.tensors.get(name)
            if value.is_floating_point() and (tensor is None or not any(tensor.axes)):
                found[name] = value.detach().cpu()
    return found


def _shown(value: Tensor) -> str:
    return f"{float(value):g}" if value.numel() == 1 else f"a tensor of mean {float(value.double().mean()):g}"


def free(tensor: TensorSpec, axis: int) -> int:
    """Number of coordinates of an axis that belong to no unit."""
    return tensor.length(axis) - sum(segment.positions.size for segment in tensor.axes[axis])


def _carried(axis: Axis) -> list[tuple[str, str, int]]:
    return [(segment.group, segment.slots, 0 if segment.slots else segment.inner) for segment in axis]


def _in_words(axis: Axis) -> str:
    parts = [f"units of {segment.group!r} of {segment.inner} coordinates each" for segment in axis]
    return " and ".join(parts) or "no units"
