"""How far the calibration data are from the data that the nodes were trained on, by channel moments.

Quantities computed on the calibration data alone cannot show it. The moments of a network's channels on its own
training data, compared with those on the calibration data, can. BatchNorm networks carry the former in their buffers;
other nodes have to send them, see `channel_moments`. They reveal the mean and the spread of every channel over the
node's data, two floats per channel, and no single input; an average over few inputs still says something about each of
them, so measure on many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from c2m3_fl.core.permutation import Permutation, apply_to_tensor
from c2m3_fl.core.spec import Params, PermutationSpec, TensorSpec
from c2m3_fl.errors import CalibrationError
from c2m3_fl.merging.recalibrate.setting import Setting, check_params
from c2m3_fl.merging.recalibrate.targets import as_it_is, output_moments
from c2m3_fl.network.calibration import Calibration, ExampleInputs
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.moments import Moments
from c2m3_fl.network.operators import Kind, Operator

OwnMoments = Mapping[str, Moments]

_SINGLE = 1e-9  # weight of all other nodes below which there is but one


def channel_moments(
    model: nn.Module,
    params: Params,
    data: Calibration,
    *,
    example_inputs: ExampleInputs | None = None,
    inputs: Sequence[str] | None = None,
) -> dict[str, Moments]:
    """Channel moments of one network on data of its own: what a node sends so that a shift can be seen.

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
        The keys that are inputs, where batches are dicts: see `load_batches`.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> moments = channel_moments(model, model.state_dict(), [torch.randn(50, 4)])
    >>> [len(found.mean) for found in moments.values()]
    [8, 3]
    """
    check_params(model, params, "params")
    held = CalibrationSet.of(model, data, example_inputs=example_inputs, inputs=inputs)
    with torch.no_grad():
        return output_moments(held.programs, held.batches, params)


def with_own_moments(
    setting: Setting, spec: PermutationSpec, moves: Sequence[Permutation], moments: Sequence[OwnMoments]
) -> Setting:
    """Return the setting with each node's own moments, mapped into the basis as the nodes themselves were.

    Parameters
    ----------
    setting : Setting
        Aligned endpoints.
    spec : PermutationSpec
        The network's symmetries.
    moves : sequence of Permutation
        Each node's map into the basis, in the order in which the nodes were given.
    moments : sequence of mappings of str to Moments
        What `channel_moments` gave for each node, in the same order.

    Raises
    ------
    CalibrationError
        When there is not one set of moments per node, or an operator is missing.
    """
    if len(moments) != len(setting.endpoints):
        raise CalibrationError(f"moments: got {len(moments)}, expected one for each of {len(setting.endpoints)} nodes")
    own = []
    for index in setting.order:
        found: dict[str, Moments] = {}
        for operator in setting.programs[0].operators:
            if operator.kind not in (Kind.LINEAR, Kind.CONVOLUTION):
                continue  # whose channels are the rows of their weight
            if operator.name not in moments[index]:
                raise CalibrationError(f"moments of node {index} lack operator {operator.name!r}")
            given = moments[index][operator.name]
            tensor = spec.tensors[operator.weight]
            rows = TensorSpec(tensor.shape[:1], tensor.axes[:1])
            mean, deviation = (apply_to_tensor(rows, moves[index], part) for part in (given.mean, given.deviation))
            found[operator.name] = Moments(given.count, mean, deviation)
        own.append(found)
    return replace(setting, own=tuple(own))


def shift(setting: Setting) -> float | None:
    """Distance of the calibration data from the nodes' own, in standard deviations of a channel.

    A node's channel is off by ``(mean - own mean) / own spread`` and stretched by the logarithm of the ratio of
    spreads. If the calibration data come from another distribution, all nodes differ in the same way; if one node saw
    few classes, it alone differs. The mean product of two different nodes' offsets, and of their stretches, therefore
    measures what they share. The shift is its root mean over an operator's channels, largest over all operators but
    those that give the output, whose channels are classes.

    Returns
    -------
    float, optional
        None when no node's own moments are known in the basis of the merge.
    """
    aligned = all(view is as_it_is for view in setting.views)  # linear maps would need covariances
    own = setting.own or (_buffered(setting) if aligned else ())
    if not own or not own[0]:
        return None
    weights = setting.weights.to(setting.device)[:, None]
    final = {operator.name for operator in setting.programs[0].operators if operator.final}
    hidden = [name for name in own[0] if name not in final] or list(own[0])
    distances = []
    for name in hidden:
        pairs = [_compared(found[name], kept[name]) for found, kept in zip(setting.moments, own, strict=True)]
        # offsets that oppose each other, as under label skew, must not hide a stretch that all nodes share
        shared = sum(max(0.0, _shared(torch.stack(part), weights)) for part in zip(*pairs, strict=True))
        distances.append(math.sqrt(shared))
    return max(distances)


def _shared(values: Tensor, weights: Tensor) -> float:
    """Weighted mean product of two different nodes' values, mean over channels; of one node its square."""
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
    """The moments that BatchNorm keeps of its inputs, as moments of the operators that feed it."""
    fed = {operator.name: _next_norm(setting, operator) for operator in setting.programs[0].operators}
    return tuple(
        {
            name: Moments(1, endpoint[norm.mean].double(), endpoint[norm.variance].double())
            for name, norm in fed.items()
            if norm is not None
        }
        for endpoint in setting.endpoints
    )


def _next_norm(setting: Setting, operator: Operator) -> Operator | None:
    if not operator.linear or not operator.feeds_norm:
        return None
    (user,) = operator.node.users
    norms = (each for each in setting.programs[0].operators if each.node is user and each.kind is Kind.BATCH_NORM)
    return next((each for each in norms if each.mean), None)
