"""Linear maps of units in place of permutations: onto the axes that produce them, inverted onto those that read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params, PermutationSpec, Segment, TensorSpec
from c2m3_fl.errors import ConfigError


def check_mappable(spec: PermutationSpec) -> None:
    """Raise `ConfigError` where units are tied in a way that permutations respect and linear maps do not."""
    for name, group in spec.groups.items():
        if group.parent is not None:
            raise ConfigError(
                f"group {name!r} may be permuted inside the blocks of {group.parent!r} only; a linear map would mix "
                "them: use a method of permutations, such as 'c2m3'"
            )
    for name, tensor in spec.tensors.items():
        groups = [segment.group for _, segment in tensor.segments]
        if tensor.diagonal > 1 and groups:
            raise ConfigError(
                f"{name!r} is a grouped convolution, whose zero blocks a linear map would fill; "
                "use a method of permutations, such as 'c2m3'"
            )


def mapped(spec: PermutationSpec, maps: Mapping[str, Tensor], params: Params) -> dict[str, Tensor]:
    """Apply each group's map to axis 0 and to vectors, and its inverse to every other axis.

    Variances are mapped as those of uncorrelated units, by the squares; re-estimate them afterwards.
    """
    inverses = {name: torch.linalg.inv(matrix) for name, matrix in maps.items()}
    squares = {name: matrix.square() for name, matrix in maps.items()}
    return {
        name: _mapped(spec.tensors[name], squares if name.endswith("running_var") else maps, inverses, value)
        for name, value in params.items()
    }


def _mapped(tensor: TensorSpec, maps: Mapping[str, Tensor], inverses: Mapping[str, Tensor], value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    result = value.double()
    for axis, segment in tensor.segments:
        matrix = maps[segment.group] if axis == 0 else inverses[segment.group].T
        result = _along(result, axis, segment, matrix.to(result.device))
    return result.to(value.dtype)


def _along(value: Tensor, axis: int, segment: Segment, matrix: Tensor) -> Tensor:
    moved = value.movedim(axis, 0).clone()
    positions = torch.from_numpy(segment.positions).to(value.device)
    moved[positions] = torch.einsum("uv,vs...->us...", matrix, moved[positions])
    return moved.movedim(0, axis)
