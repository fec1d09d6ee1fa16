"""Tensors that share memory carry the same units where they do: transposes, slices and views of one parameter."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from c2m3_fl.network.shared_storage import overlaps
from c2m3_fl.symmetry.facts import Structure


def tie_shared(
    structure: Structure,
    model: nn.Module,
    state: Mapping[str, Tensor],
    first_name: Mapping[str, str],
    read: Collection[str],
) -> None:
    """Tie the axes of tensors that share entries, and pin those whose common entries no axes express.

    Other tensors that the modules hold are constants of the graph: a parameter that shares entries with one that is
    read is pinned.

    Parameters
    ----------
    structure : Structure
        The object that takes the facts.
    model : nn.Module
        The network.
    state : mapping of str to Tensor
        Parameters and buffers under the names of the state dict.
    first_name : mapping of str to str
        The first name of every tied tensor.
    read : collection of str
        Names of the tensors that the pass reads.
    """
    own = {name: value for name, value in state.items() if first_name.get(name, name) == name}
    structure.operator = structure.module = ""
    for found in overlaps({**{name: value for name, value in _constants(model).items() if name in read}, **own}):
        names = [name for name in (found.first, found.second) if name in own]
        if not names:
            continue
        blocks = any(name in structure.diagonal for name in names)
        if len(names) < 2 or found.axes is None or blocks:
            for name, other in ((found.first, found.second), (found.second, found.first)):
                if name in own:
                    for dim, size in enumerate(own[name].shape):
                        structure.pin(structure.axis(name, dim, size), f"shares memory with {other!r}")
            continue
        first, second = own[found.first], own[found.second]
        for left, places, right, others in found.axes:
            parts = [(found.first, left, first, places), (found.second, right, second, others)]
            atoms = [structure.axis(name, dim, x.shape[dim])[at] for name, dim, x, at in parts if dim >= 0]
            structure.gather(atoms[0])
            structure.tie(atoms[0], atoms[-1])


def _constants(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that modules hold as attributes or as buffers."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in model.named_modules()
        for name, value in {**vars(module), **module._buffers}.items()
        if isinstance(value, Tensor)
    }
