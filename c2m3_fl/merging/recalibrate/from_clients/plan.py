"""What clients are asked for a refit: per operator its role, its size in bytes, and the exchange it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

import torch
from torch import fx

from c2m3_fl.core.spec import Params
from c2m3_fl.merging.recalibrate.from_clients.sketch import held_out_size
from c2m3_fl.merging.recalibrate.head.last_layer import reads_input
from c2m3_fl.network.operators import Kind, Operator
from c2m3_fl.network.program import Program
from c2m3_fl.network.rows import weight_matrix

FITTED = (Kind.LINEAR, Kind.CONVOLUTION, Kind.PRODUCT)
_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_IDENTITIES = (torch.ops.aten.dropout.default, torch.ops.aten.feature_dropout.default)  # in evaluation mode
_COUNT = 8  # bytes of a count, and of every number of channel moments


class Role(Enum):
    """What clients answer about an operator."""

    FIT = "fit"  # sums of its inputs in the merged network and of the residuals to the own network's output
    MOMENTS = "moments"  # channel moments of its output, in the merged and in the own network
    STATISTICS = "statistics"  # channel moments of a BatchNorm's input in the merged network
    GRAM = "gram"  # second moments of its inputs in the own network


@dataclass(frozen=True)
class Question:
    """One operator that clients are asked about.

    Attributes
    ----------
    place : int
        Its number among the program's operators.
    role : Role
        What they answer.
    size : int
        Bytes of one client's answer.
    sketch : int
        Number of rows of the random sketches that are answered in place of sums; 0 for sums.
    """

    place: int
    role: Role
    size: int
    sketch: int = 0


@dataclass(frozen=True)
class Plan:
    """All that clients are asked.

    Attributes
    ----------
    exchanges : tuple of tuples of Question
        In forward order; the operators of one exchange are measured under one merged network.
    sketched : tuple of str
        Names of the operators that are answered about by sketches, because their sums exceed the limit.
    too_large : tuple of str
        Names of the operators that exceed it all the same; their channel moments are repaired instead.
    kept_back : tuple of str
        Names of the operators that read the network's input, whose second moments are not asked for.
    """

    exchanges: tuple[tuple[Question, ...], ...]
    sketched: tuple[str, ...]
    too_large: tuple[str, ...]
    kept_back: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of one client's answers over all exchanges."""
        return sum(step.size for exchange in self.exchanges for step in exchange)


def plan_refit(
    program: Program,
    params: Params,
    *,
    exchanges: int | None,
    width: int,
    max_bytes: int,
    first_layer: bool,
    sketch: int = 0,
) -> Plan:
    """Decide every operator's role and exchange.

    Parameters
    ----------
    program : Program
        The traced network.
    params : mapping of str to Tensor
        A state dict of it, for the shapes.
    exchanges : int, optional
        Largest number of exchanges; one per operator by default.
    width : int
        Bytes of a number in sums: 4 or 8.
    max_bytes : int
        Limit of one client's answers about fitted operators, over all exchanges. Of the largest operators sketches
        are asked for where sums would exceed it; where that does not suffice, the largest are left out.
    first_layer : bool
        Whether the second moments of the network's input are asked for.
    sketch : int
        Number of rows of a sketch; 0 leaves operators out instead.
    """
    candidates = {
        place: fit_size(program, operator, params, width)
        for place, operator in enumerate(program.operators)
        if operator.kind in FITTED and (first_layer or not reads_input(program, operator))
    }
    smaller = {
        place: size
        for place, exact in candidates.items()
        if sketch and (size := fit_size(program, program.operators[place], params, width, sketch)) < exact
    }
    fitted, too_large = _below(candidates, max_bytes, smaller)
    sketched = [place for place in fitted if fitted[place] != candidates[place]]
    folded = {norm.name for place in fitted if (norm := norm_behind(program, program.operators[place]))}
    steps = []
    for place, operator in enumerate(program.operators):
        if place in fitted:
            steps.append(Question(place, Role.FIT, fitted[place], sketch if place in sketched else 0))
        elif operator.mean and operator.name not in folded:
            steps.append(Question(place, Role.STATISTICS, _moments_size(program, operator)))
        elif not operator.mean and operator.weight and not operator.feeds_norm:
            steps.append(Question(place, Role.MOMENTS, 2 * _moments_size(program, operator)))
    return Plan(
        _chunks(steps, exchanges),
        _names(program, sketched),
        _names(program, too_large),
        _kept_back(program, first_layer),
    )


def plan_gram(program: Program, params: Params, *, width: int, max_bytes: int, first_layer: bool) -> Plan:
    """As `plan_refit` for second moments of each network's own inputs, in one exchange."""
    candidates = {
        place: gram_size(operator, params, width)
        for place, operator in enumerate(program.operators)
        if operator.kind in FITTED and (first_layer or not reads_input(program, operator))
    }
    asked, too_large = _below(candidates, max_bytes, {})
    steps = [Question(place, Role.GRAM, size) for place, size in asked.items()]
    return Plan(_chunks(steps, 1), (), _names(program, too_large), _kept_back(program, first_layer))


def fit_size(program: Program, operator: Operator, params: Params, width: int, sketch: int = 0) -> int:
    """Bytes of the sums of one operator, or of sketches of some rows, of examples to fit and of examples held out."""
    groups, inputs, outputs = weight_matrix(operator, params[operator.weight]).shape
    targets = 1 if skip_beside(program, operator) is None else 2
    if sketch:
        numbers = (2 + sketch + held_out_size(sketch)) * (inputs + targets * outputs)
    else:
        numbers = 2 * (inputs + triangle(inputs) + targets * (2 * outputs + inputs * outputs))
    return groups * numbers * width + 2 * _COUNT


def gram_size(operator: Operator, params: Params, width: int) -> int:
    """Bytes of the second moments of one operator's inputs."""
    groups, inputs, _ = weight_matrix(operator, params[operator.weight]).shape
    return groups * (inputs + triangle(inputs)) * width + _COUNT


def triangle(inputs: int) -> int:
    """Number of entries of a symmetric matrix on and below its diagonal."""
    return inputs * (inputs + 1) // 2


def norm_behind(program: Program, operator: Operator) -> Operator | None:
    """The BatchNorm with running statistics that alone reads an operator's output: both are one linear operator."""
    if not operator.feeds_norm:
        return None
    user = next(iter(operator.node.users))
    return next((each for each in program.operators if each.node is user and each.mean), None)


def skip_beside(program: Program, operator: Operator) -> fx.Node | None:
    """The other summand, where the output goes into a residual addition alone and the other summand is there first."""
    norm = norm_behind(program, operator)
    node = operator.node if norm is None else norm.node
    while True:
        user = next(iter(node.users), None)
        if user is None or len(node.users) != 1:
            return None
        if user.target not in _IDENTITIES:
            break
        node = user
    if user.target not in _ADDITIONS or user.kwargs.get("alpha", 1) != 1:
        return None
    others = [arg for arg in user.args if isinstance(arg, fx.Node) and arg is not node]
    if len(others) != 1 or others[0].op == "placeholder" or others[0].meta["val"].shape != node.meta["val"].shape:
        return None
    before = list(program.graph.nodes)[: operator.index]
    return others[0] if others[0] in before else None


def _kept_back(program: Program, first_layer: bool) -> tuple[str, ...]:
    if first_layer:
        return ()
    return tuple(each.name for each in program.operators if each.kind in FITTED and reads_input(program, each))


def _moments_size(program: Program, operator: Operator) -> int:
    shape = operator.node.meta["val"].shape
    normalised = operator.kind is Kind.NORM and operator.layout.channel == -1
    channels = torch.Size(_normalised(operator)) if normalised else torch.Size([shape[operator.layout.channel]])
    return _COUNT * (1 + 2 * channels.numel())


def _normalised(operator: Operator) -> Sequence[int]:
    found = operator.node.args[operator.layout.arguments[1]]
    assert isinstance(found, fx.Node)  # it has a weight
    shape: Sequence[int] = found.meta["val"].shape
    return shape


def _names(program: Program, places: Sequence[int]) -> tuple[str, ...]:
    return tuple(program.operators[place].name for place in places)


def _below(sizes: Mapping[int, int], limit: int, smaller: Mapping[int, int]) -> tuple[dict[int, int], list[int]]:
    """The operators that fit within the limit, with their sizes, and those that are left out.

    The largest are left out until the smaller sizes of the rest are within the limit; then whatever still fits takes
    its own size, the least first.
    """
    kept = {**sizes, **smaller}
    left_out = []
    while sum(kept.values()) > limit:
        largest = max(kept, key=kept.__getitem__)
        left_out.append(largest)
        del kept[largest]
    for place in sorted(kept, key=sizes.__getitem__):
        if sum(kept.values()) - kept[place] + sizes[place] <= limit:
            kept[place] = sizes[place]
    return dict(sorted(kept.items())), sorted(left_out)


def _chunks(steps: Sequence[Question], exchanges: int | None) -> tuple[tuple[Question, ...], ...]:
    """Evenly many consecutive steps per exchange."""
    count = len(steps) if exchanges is None else min(exchanges, len(steps))
    bounds = [len(steps) * index // count for index in range(count + 1)] if count else []
    return tuple(tuple(steps[start:stop]) for start, stop in pairwise(bounds))
