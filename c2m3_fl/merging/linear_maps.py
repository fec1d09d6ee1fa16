"""Linear maps of units in place of permutations: onto the axes that make them, inverted onto those that read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from c2m3_fl.core.spec import Params, PermutationSpec, Segment, TensorSpec
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.repair import feeds_batch_norm
from c2m3_fl.merging.targets import View
from c2m3_fl.models.operators import LAYOUTS, MADE, RECURRENT, Operator
from c2m3_fl.models.program import Program

_EPS = 7  # place of that argument of aten.batch_norm
_UNKNOWN = -1
_CONTRACTIONS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "bilinear", "tensordot", "conv")


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


def reading_axes(spec: PermutationSpec, program: Program) -> dict[str, int]:
    """The axis of every weight that reads units; all other axes with units make them.

    Raises
    ------
    ConfigError
        Where it cannot be told, or the same axis does both, as with an embedding that is the last layer, too.
    """
    found: dict[str, int] = {}
    for node in program.graph.nodes:
        name = program.names.get(node.name, "")
        if not name or not any(spec.tensors[name].axes):
            continue
        roles = set(_roles(spec.tensors[name], program, node))
        if len(roles) > 1 or _UNKNOWN in roles:
            raise ConfigError(
                f"{name!r} both makes and reads units, or is used in a way that does not tell, so no linear map fits "
                "it: use a method of permutations, such as 'c2m3'"
            )
        names = (name, *program.aliases.get(name, ()))
        found |= {each: axis for each in names for axis in roles if axis is not None}
    return found


def _roles(tensor: TensorSpec, program: Program, node: fx.Node, *, derived: bool = False) -> Iterator[int | None]:
    """The axis by which every use of a parameter reads units; `derived` where `node` is made of it."""
    for user in node.users:
        if user.op != "output" and _of_parameters(program, user):
            yield from _roles(tensor, program, user, derived=True)
            continue
        layout = LAYOUTS.get(user.target)
        if not derived and layout is not None and node in user.args[layout.arguments[1] :][:1]:
            axis = 1 - MADE[layout.kind] if layout.kind in MADE else None
        elif not derived and user.target in RECURRENT:
            axis = 1 if len(tensor.shape) > 1 else None
        else:
            axis = _UNKNOWN if _name(user).startswith(_CONTRACTIONS) and len(tensor.shape) > 1 else None
        yield axis if axis is None or axis == _UNKNOWN or tensor.axes[axis] else None


def _of_parameters(program: Program, node: fx.Node) -> bool:
    """Whether a value is made of parameters alone."""
    inputs = node.all_input_nodes
    return node.name in program.names or (bool(inputs) and all(_of_parameters(program, each) for each in inputs))


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "").split(".")[0]


def mapped(
    spec: PermutationSpec, maps: Mapping[str, Tensor], params: Params, reads: Mapping[str, int]
) -> dict[str, Tensor]:
    """Apply each group's map to the axes that make its units, and its inverse to those that read them.

    Variances are mapped as those of uncorrelated units, by the squares; re-estimate them afterwards.
    """
    inverses = {name: torch.linalg.inv(matrix) for name, matrix in maps.items()}
    squares = {name: matrix.square() for name, matrix in maps.items()}
    return {
        name: _mapped(
            spec.tensors[name], squares if name.endswith("running_var") else maps, inverses, value, reads.get(name)
        )
        for name, value in params.items()
    }


def seen_through(spec: PermutationSpec, maps: Mapping[str, Tensor]) -> View:
    """How the outputs of a network are seen in the basis that its units are mapped to, in the outputs' own type."""
    return partial(_seen, spec, maps)


def _seen(spec: PermutationSpec, maps: Mapping[str, Tensor], operator: Operator, value: Tensor) -> Tensor:
    if not operator.weight:
        return value
    tensor = spec.tensors[operator.weight]
    made = MADE.get(operator.kind)
    sides = tensor.axes if made is None else tensor.axes[made : made + 1]
    channels = (axis for axis in operator.channel_axes({operator.weight: torch.empty(tensor.shape)}))
    for axis, segments in zip(channels, sides, strict=True):
        for segment in segments:
            value = _along(value, axis, segment, maps[segment.group].to(value))
    return value


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


def _mapped(
    tensor: TensorSpec, maps: Mapping[str, Tensor], inverses: Mapping[str, Tensor], value: Tensor, reads: int | None
) -> Tensor:
    if not value.is_floating_point():
        return value
    result = value.double()
    for axis, segment in tensor.segments:
        matrix = inverses[segment.group].T if axis == reads else maps[segment.group]
        result = _along(result, axis, segment, matrix.to(result.device))
    return result.to(value.dtype)


def _along(value: Tensor, axis: int, segment: Segment, matrix: Tensor) -> Tensor:
    moved = value.movedim(axis, 0).clone()
    positions = torch.from_numpy(segment.positions).to(value.device)
    moved[positions] = torch.einsum("uv,vs...->us...", matrix, moved[positions])
    return moved.movedim(0, axis)
