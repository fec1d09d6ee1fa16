"""Linear maps of units in place of permutations: onto the axes that produce them, inverted onto those that read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params, PermutationSpec, Segment, TensorSpec
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.repair import feeds_batch_norm
from c2m3_fl.models.program import Program

_EPS = 7  # place of that argument of aten.batch_norm


def check_mappable(spec: PermutationSpec) -> None:
    """Raise `ConfigError` where units are tied in a way that permutations respect and linear maps do not."""
    for name, group in spec.groups.items():
        if group.parent is not None:
            raise ConfigError(
                f"group {name!r} may be permuted inside the blocks of {group.parent!r} only; a linear map would mix "
                "them: use a method of permutations, such as 'c2m3'"
            )
    for name, tensor in spec.tensors.items():
        if any(segment.slots for _, segment in tensor.segments):
            raise ConfigError(
                f"{name!r} has units of two groups on one axis, which a linear map would mix; "
                "use a method of permutations, such as 'c2m3'"
            )
        if tensor.diagonal > 1 and any(tensor.axes):
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


@dataclass(frozen=True)
class Normalised:
    """A linear operator and the BatchNorm that alone reads it.

    Attributes
    ----------
    weight, bias : str
        Parameters of the operator; "" where it has no bias.
    scale, mean, variance : str
        Weight and running statistics of the norm; its bias moves like any other.
    eps : float
        What the norm adds to variances.
    """

    weight: str
    bias: str
    scale: str
    mean: str
    variance: str
    eps: float


def normalised(program: Program) -> tuple[Normalised, ...]:
    """The operators of a network whose output a BatchNorm with weight and running statistics takes."""
    producers = {each.node: each for each in program.operators if each.linear and feeds_batch_norm(each)}
    found = []
    for norm in program.operators:
        producer = producers.get(norm.input)
        if producer is not None and norm.mean and norm.weight:
            names = (producer.weight, producer.bias, norm.weight, norm.mean, norm.variance)
            found.append(Normalised(*names, float(str(norm.node.args[_EPS]))))
    return tuple(found)


def folded(pairs: Sequence[Normalised], params: Params) -> dict[str, Tensor]:
    """The same function with every such norm's scale moved into the operator before it.

    A linear map of units does not commute with a scale per unit; once the norm scales by one, it does. The norm's
    weight keeps the spread of its output, with a running variance that undoes it, so that statistics may be
    re-estimated later.
    """
    result = dict(params)
    for pair in pairs:
        weight, scale = params[pair.weight], params[pair.scale].double()
        factor = scale / (params[pair.variance].double() + pair.eps).sqrt()
        result[pair.weight] = (weight.double() * factor.reshape(-1, *(1,) * (weight.ndim - 1))).to(weight.dtype)
        for name in (pair.bias, pair.mean):
            if name:
                result[name] = (params[name].double() * factor).to(params[name].dtype)
        _spread(result, pair, scale.square())
    return result


def spread_again(
    pairs: Sequence[Normalised],
    spec: PermutationSpec,
    maps: Mapping[str, Tensor],
    given: Params,
    moved: dict[str, Tensor],
) -> None:
    """Set the spread of folded norms, in place, to that of the mapped units: that of uncorrelated ones."""
    for pair in pairs:
        squares = given[pair.scale].double().square()
        for _, segment in spec.tensors[pair.scale].segments:
            squares = _along(squares, 0, segment, maps[segment.group].square().to(squares.device))
        _spread(moved, pair, squares)


def _spread(params: dict[str, Tensor], pair: Normalised, variance: Tensor) -> None:
    """A norm that multiplies by one, written as the weight sqrt(variance) over a running variance of that size."""
    variance = variance.clamp_min(pair.eps)
    params[pair.scale] = variance.sqrt().to(params[pair.scale].dtype)
    params[pair.variance] = (variance - pair.eps).to(params[pair.variance].dtype)


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
