"""Linear maps of units instead of permutations, applied to axes that produce units, inverted on axes that read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from c2m3_fl.core.spec import Params, PermutationSpec, Segment, TensorSpec
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.recalibrate.targets import View
from c2m3_fl.network.operators import LAYOUTS, OUTPUT_AXIS, RECURRENT, Kind, Operator
from c2m3_fl.network.program import Program

_EPS = 7  # position of eps among the arguments of aten.batch_norm
_WEIGHTS = 2  # position of the weights among the arguments of recurrent operators
UNKNOWN = -1  # role of an axis whose use is not recognised
_CUTS = ("slice", "split", "split_with_sizes", "chunk", "narrow", "getitem", "contiguous", "detach", "clone")
_CONTRACTIONS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "bilinear", "tensordot", "conv")


def check_mappable(spec: PermutationSpec) -> None:
    """Raise `ConfigError` if the symmetries constrain units in a way that only permutations satisfy."""
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
    """The axis of every weight that reads units; all other axes with units produce them.

    Raises
    ------
    ConfigError
        When the axis is unknown, or a tensor both produces and reads units, as an embedding tied to the last layer.
    """
    found: dict[str, int] = {}
    for name, roles in axis_roles(spec, program).items():
        if len(roles) > 1 or UNKNOWN in roles:
            raise ConfigError(
                f"{name!r} both produces and reads units, or its use is not recognised, so it cannot be mapped "
                "linearly: use a method of permutations, such as 'c2m3'"
            )
        axis = next(iter(roles), None)
        if axis is not None:
            found[name] = axis
    return found


def axis_roles(spec: PermutationSpec, program: Program) -> dict[str, set[int | None]]:
    """Of every parameter with units the axes that read units: None if some use only produces, `UNKNOWN` if unclear."""
    found: dict[str, set[int | None]] = {}
    for node in program.graph.nodes:
        name = program.names.get(node.name, "")
        if not name or not any(spec.tensors[name].axes):
            continue
        roles = {_reading_axis(spec.tensors[name], node, value, user) for value, user in _uses(node)}
        for each in program.all_names(name):
            found.setdefault(each, set()).update(roles)
    return found


def _uses(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Operators that use a parameter, directly or after elementwise operators, as a weight or in a contraction."""
    reached, open_nodes = {node}, [node]
    while open_nodes:
        value = open_nodes.pop()
        for user in value.users:
            if user.target in LAYOUTS or user.target in RECURRENT or _contracts(user):
                yield value, user
            elif user not in reached:
                reached.add(user)
                open_nodes.append(user)


def _reading_axis(tensor: TensorSpec, node: fx.Node, value: fx.Node, user: fx.Node) -> int | None:
    """The axis of a parameter that reads units in one use: None if that use only produces units, -1 if unknown."""
    layout, direct, vector = LAYOUTS.get(user.target), _is_part(value, node), len(tensor.shape) == 1
    if layout is not None:
        if (
            layout.kind not in OUTPUT_AXIS
            or value not in user.args[layout.arguments[1] :][:1]
            or (vector and not direct)
        ):
            return None  # a scale, or units that another weight reads
        convolution = layout.kind in (Kind.CONVOLUTION, Kind.TRANSPOSED)
        axis = 1 - OUTPUT_AXIS[layout.kind] if direct and (convolution or len(tensor.shape) == 2) else UNKNOWN
    elif user.target in RECURRENT:
        weights = user.args[_WEIGHTS]
        if vector or not isinstance(weights, Sequence) or value not in weights:
            return None  # a bias, or an input
        axis = 1 if direct else UNKNOWN
    else:
        return UNKNOWN if direct or not vector else None
    return axis if axis == UNKNOWN or tensor.axes[axis] else None


def _is_part(value: fx.Node, node: fx.Node) -> bool:
    """Whether a value is a parameter, or a part of it that is cut out along an axis: all axes keep their meaning."""
    while value is not node:
        source = value.args[0] if value.args else None
        if getattr(value.target, "__name__", "").split(".")[0] not in _CUTS or not isinstance(source, fx.Node):
            return False
        value = source
    return True


def _contracts(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "").startswith(_CONTRACTIONS)


def mapped(
    spec: PermutationSpec, maps: Mapping[str, Tensor], params: Params, reads: Mapping[str, int], program: Program
) -> dict[str, Tensor]:
    """Apply each group's map to the axes that produce its units, and its inverse to those that read them.

    Variances of BatchNorm (re-estimate them afterwards) and the squared scales of norms are mapped as variances of
    uncorrelated units: by the squared entries of the map.

    Parameters
    ----------
    spec : PermutationSpec
        The network's symmetries.
    maps : mapping of str to Tensor
        A matrix per group.
    params : mapping of str to Tensor
        State dict of the network.
    reads : mapping of str to int
        The axis of every weight that reads units: see `reading_axes`.
    program : Program
        The exported network.
    """
    inverses = {name: torch.linalg.inv(matrix).T for name, matrix in maps.items()}
    squares = {name: matrix.square() for name, matrix in maps.items()}
    scales = {name for each in program.operators if not each.linear for name in program.all_names(each.weight)}
    variances = {name for each in program.operators for name in program.all_names(each.variance)}
    result = dict(params)
    for name, value in params.items():
        tensor, given = spec.tensors[name], value.double()
        if name in scales:
            spread = _along_all(tensor, squares, given.square()).sqrt()
            result[name] = spread.copysign(_along_all(tensor, squares, given)).to(value.dtype)
        elif value.is_floating_point() and any(tensor.axes):
            chosen = squares if name in variances else maps
            for axis, segment in tensor.segments:
                matrix = inverses if axis == reads.get(name) else chosen
                given = _along(given, axis, segment, matrix[segment.group])
            result[name] = given.to(value.dtype)
    return result


def _along_all(tensor: TensorSpec, maps: Mapping[str, Tensor], value: Tensor) -> Tensor:
    for axis, segment in tensor.segments:
        value = _along(value, axis, segment, maps[segment.group])
    return value


def seen_through(spec: PermutationSpec, maps: Mapping[str, Tensor]) -> View:
    """The view of a network's outputs in the basis that its units are mapped to."""
    return partial(_seen, spec, maps)


def _seen(spec: PermutationSpec, maps: Mapping[str, Tensor], operator: Operator, value: Tensor) -> Tensor:
    name = operator.weight or operator.mean
    tensor = spec.tensors[name]
    made = OUTPUT_AXIS.get(operator.kind)
    sides = tensor.axes if made is None else tensor.axes[made : made + 1]
    channels = operator.channel_axes({name: torch.empty(tensor.shape, device="meta")})
    for axis, segments in zip(channels, sides, strict=True):
        for segment in segments:
            value = _along(value, axis, segment, maps[segment.group])
    return value


@dataclass(frozen=True)
class Normalised:
    """A linear operator and the only user of its output, a BatchNorm with weight and running statistics."""

    producer: Operator
    norm: Operator

    @property
    def eps(self) -> float:
        """Constant that the norm adds to variances."""
        return float(str(self.norm.node.args[_EPS]))


def normalised(program: Program) -> tuple[Normalised, ...]:
    """All pairs of a linear operator and a BatchNorm, with weight and running statistics, that is its only user."""
    producers = {each.node: each for each in program.operators if each.linear and each.feeds_norm}
    norms = (each for each in program.operators if each.mean and each.weight and each.input in producers)
    return tuple(Normalised(producers[norm.input], norm) for norm in norms)


def folded(program: Program, pairs: Sequence[Normalised], params: Params) -> dict[str, Tensor]:
    """Fold every such norm's scale into the operator before it; the function stays the same.

    A linear map of units does not commute with a scale per unit, so the norm must multiply by one. The norm's weight
    becomes the spread of its output, and its running variance the square, so that statistics may be re-estimated later.

    Parameters
    ----------
    program : Program
        The exported network.
    pairs : sequence of Normalised
        The norms and the operators before them: see `normalised`.
    params : mapping of str to Tensor
        State dict of the network; not mutated.
    """
    result = dict(params)
    for pair in pairs:
        producer, norm = pair.producer, pair.norm
        scale = params[norm.weight].double()
        factor = scale / (params[norm.variance].double() + pair.eps).sqrt()
        program.assign(result, producer.weight, producer.rescaled(params[producer.weight].double(), factor))
        for name in (producer.bias, norm.mean):
            if name:
                program.assign(result, name, params[name].double() * factor.reshape(params[name].shape))
        _spread(program, result, pair, scale.square())
    return result


def spread_again(program: Program, pairs: Sequence[Normalised], moved: dict[str, Tensor]) -> None:
    """Make folded norms multiply by one again, in place, with the spread of the mapped units as their weight.

    Parameters
    ----------
    program : Program
        The exported network.
    pairs : sequence of Normalised
        The folded norms.
    moved : dict of str to Tensor
        The mapped state dict; changed in place.
    """
    for pair in pairs:
        _spread(program, moved, pair, moved[pair.norm.weight].double().square())


def _spread(program: Program, params: dict[str, Tensor], pair: Normalised, variance: Tensor) -> None:
    """Make a norm multiply by one: its weight is sqrt(variance), its running variance (plus eps) the variance."""
    variance = variance.clamp_min(pair.eps)
    program.assign(params, pair.norm.weight, variance.sqrt())
    program.assign(params, pair.norm.variance, variance - pair.eps)


def _along(value: Tensor, axis: int, segment: Segment, matrix: Tensor) -> Tensor:
    moved = value.movedim(axis, 0).clone()
    positions = torch.from_numpy(segment.positions).to(value.device)
    moved[positions] = torch.einsum("uv,vs...->us...", matrix.to(moved), moved[positions])
    return moved.movedim(0, axis)
