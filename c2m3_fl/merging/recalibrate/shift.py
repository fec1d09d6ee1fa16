"""How far the calibration data are from the data that the nodes were trained on, by channel moments.

Quantities computed on the calibration data alone cannot detect a shift. The moments of a network's channels on its own
training data, compared with those on the calibration data, can. Networks with BatchNorm store the former in their
buffers; other nodes have to send them: see `channel_moments`. The moments disclose the mean and the spread of every
channel over the node's data (two floats per channel), and no single input. A mean over few inputs still discloses
something about each of them, so measure on many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from c2m3_fl.core.permutation import Permutation, apply_to_tensor
from c2m3_fl.core.spec import Params, PermutationSpec, TensorSpec, refuse_rotations
from c2m3_fl.errors import CalibrationError
from c2m3_fl.merging.recalibrate.setting import Setting, check_params
from c2m3_fl.merging.recalibrate.targets import as_it_is, output_moments
from c2m3_fl.network.calibration import Calibration, ExampleInputs
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.moments import Moments
from c2m3_fl.network.operators import Kind, Operator

OwnMoments = Mapping[str, Moments]

_MOMENTUM = 6  # position of the momentum among the arguments of aten.batch_norm
_SINGLE = 1e-9  # if the other nodes' total weight is smaller, there is only one node


def channel_moments(
    model: nn.Module,
    params: Params,
    data: Calibration,
    *,
    example_inputs: ExampleInputs | None = None,
    inputs: Sequence[str] | None = None,
) -> dict[str, Moments]:
    """Channel moments of one network on its own data, which a node sends so that a shift can be detected.

    Parameters
    ----------
    model : nn.Module
        The architecture; not mutated.
    params : mapping of str to Tensor
        The node's state dict.
    data : iterable of batches
        Inputs that the node was trained on; labels are ignored.
    example_inputs : Tensor, tuple or dict, optional
        A tuple or dict says how many inputs the network takes; otherwise one.
    inputs : sequence of str, optional
        The keys of dict batches that are inputs: see `load_batches`.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> moments = channel_moments(model, model.state_dict(), [torch.randn(50, 4)])
    >>> [len(found.mean) for found in moments.values()]
    [8, 3]
    """
    check_params(model, params, "params")
    held = CalibrationSet.of(model, data, example_inputs=example_inputs, inputs=inputs)
    held = held.to(next(iter(params.values())).device)
    with torch.no_grad():
        return output_moments(held.programs, held.batches, params)


def with_own_moments(
    setting: Setting, spec: PermutationSpec, moves: Sequence[Permutation], moments: Sequence[OwnMoments | None]
) -> Setting:
    """Return the setting with each node's own moments, mapped into the basis like the nodes.

    Parameters
    ----------
    setting : Setting
        Aligned endpoints.
    spec : PermutationSpec
        The network's symmetries.
    moves : sequence of Permutation
        Each node's map into the basis, in the order in which the nodes were given.
    moments : sequence of mappings of str to Moments, or None
        The `channel_moments` of each node, in the same order; None for a node of which they are not known.

    Raises
    ------
    CalibrationError
        When there is not one set of moments per node, or an operator is missing.
    """
    refuse_rotations(spec, "own moments, which are of single channels")
    if len(moments) != len(setting.endpoints):
        raise CalibrationError(f"moments: got {len(moments)}, expected one for each of {len(setting.endpoints)} nodes")
    linear = [each for each in setting.programs[0].operators if each.kind in (Kind.LINEAR, Kind.CONVOLUTION)]
    own: list[OwnMoments] = []
    for index in setting.order:  # of linear operators alone: others' channels are not the rows of a weight
        told, found = moments[index], dict[str, Moments]()
        if told is None:
            own.append(found)
            continue
        for operator in linear:
            if operator.name not in told:
                raise CalibrationError(f"moments of node {index} lack operator {operator.name!r}")
            given = told[operator.name]
            tensor = spec.tensors[operator.weight]
            rows = TensorSpec(tensor.shape[:1], tensor.axes[:1])
            parts = (part.to(setting.device) for part in (given.mean, given.deviation))
            mean, deviation = (apply_to_tensor(rows, moves[index], part) for part in parts)
            found[operator.name] = Moments(given.count, mean, deviation)
        own.append(found)
    return replace(setting, own=tuple(own))


def shift(setting: Setting) -> float | None:
    """Distance of the calibration data from the nodes' own, in standard deviations of a channel.

    A channel's offset is ``(mean - own mean) / own spread``; its stretch is the logarithm of the ratio of spreads. If
    the calibration data come from another distribution, all nodes differ in the same way; if one node saw few classes,
    only that node differs. The mean product of two different nodes' offsets, and of their stretches, therefore measures
    the common difference. The shift is the root of its mean over an operator's channels, maximised over all operators
    except those that give the output, whose channels are classes.

    Returns
    -------
    float, optional
        None when no node's own moments are known in the basis of the merge.
    """
    aligned = all(view is as_it_is for view in setting.views)  # linear maps would need covariances
    own = setting.own or (_buffered(setting) if aligned else ())
    known = [index for index, kept in enumerate(own) if kept]
    if not known:
        return None
    own = tuple(own[index] for index in known)
    share = setting.weights.tolist()
    total = math.fsum(share[index] for index in known) or 1.0
    weights = torch.tensor([[share[index] / total] for index in known], dtype=torch.float64, device=setting.device)
    final = {operator.name for operator in setting.programs[0].operators if operator.final}
    hidden = [name for name in own[0] if name not in final] or list(own[0])
    distances = []
    for name in hidden:
        pairs = [_compared(setting.moments[index][name], kept[name]) for index, kept in zip(known, own, strict=True)]
        # clamped, since opposite offsets, as under label skew, must not cancel a stretch that all nodes share
        shared = sum(max(0.0, _shared(torch.stack(part), weights)) for part in zip(*pairs, strict=True))
        distances.append(math.sqrt(shared))
    return max(distances)


def _shared(values: Tensor, weights: Tensor) -> float:
    """Mean over channels of the weighted mean product of two different nodes' values; of one node its square."""
    alone = float(weights.square().sum())
    if alone > 1 - _SINGLE:
        return float((weights * values).sum(0).square().mean())
    products = (weights * values).sum(0).square() - (weights * values).square().sum(0)
    return float(products.mean()) / (1 - alone)


def _compared(found: Moments, own: Moments) -> tuple[Tensor, Tensor]:
    """Per channel the offset in units of the own spread, and the logarithm of the ratio of spreads."""
    alive = (own.std > 0) & (found.std > 0)
    spread = torch.where(alive, own.std, 1.0)
    offset = torch.where(alive, (found.mean - own.mean) / spread, 0.0)
    return offset, torch.where(alive, found.std / spread, 1.0).log()


def _buffered(setting: Setting) -> tuple[dict[str, Moments], ...]:
    """Running statistics of BatchNorm, as moments of the operators whose outputs they describe."""
    fed = {operator.name: _next_norm(setting, operator) for operator in setting.programs[0].operators}
    return tuple(
        {name: _settled(norm, endpoint) for name, norm in fed.items() if norm is not None}
        for endpoint in setting.endpoints
    )


def _settled(norm: Operator, endpoint: Params) -> Moments:
    """Running statistics, without what is left in them of their initial values, 0 and 1.

    After n batches that is a share of (1 - momentum)ⁿ, as in Adam's moments (Kingma and Ba 2015, section 3): nearly a
    half after a client's first eight batches. A variance below it proves that the statistics began otherwise, as those
    of a trained network whose counter was lost; they are used as they are, as are those without a counter.
    """
    mean, variance = endpoint[norm.mean].double(), endpoint[norm.variance].double()
    counter = endpoint.get(norm.mean.removesuffix("running_mean") + "num_batches_tracked")
    momentum = norm.node.args[_MOMENTUM]
    assert isinstance(momentum, float | int)  # as its schema says
    left = 1.0 if counter is None else (1.0 - momentum) ** float(counter.double().mean())
    if 0 < left < 1 and bool((variance >= left).all()):
        mean, variance = mean / (1 - left), (variance - left) / (1 - left)
    return Moments(1, mean, variance)


def _next_norm(setting: Setting, operator: Operator) -> Operator | None:
    if not operator.linear or not operator.feeds_norm:
        return None
    (user,) = operator.node.users
    norms = (each for each in setting.programs[0].operators if each.node is user and each.kind is Kind.BATCH_NORM)
    return next((each for each in norms if each.mean), None)
