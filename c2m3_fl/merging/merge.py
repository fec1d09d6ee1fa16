"""Models in, model out: match, average in one basis, recalibrate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor, nn

from c2m3_fl.core import permutation
from c2m3_fl.core.averaging import normalise_weights, weighted_mean
from c2m3_fl.core.basis import consensus
from c2m3_fl.core.result import Match
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.state_dicts import order_by_weight, to_device
from c2m3_fl.errors import ConfigError, ParamsError
from c2m3_fl.merging.align.base import Alignment, Method, Nodes
from c2m3_fl.merging.align.methods import CycleConsistent, MergeStart, resolve_method
from c2m3_fl.merging.recalibrate import short_names
from c2m3_fl.merging.recalibrate.auto import Auto
from c2m3_fl.merging.recalibrate.setting import Setting, check_params, check_types, prepare, usable_device
from c2m3_fl.merging.recalibrate.shift import OwnMoments, with_own_moments
from c2m3_fl.merging.recalibrate.short_names import Recalibration, resolve, resolve_for
from c2m3_fl.merging.reports import MergeReport, RecalibrationReport
from c2m3_fl.network.calibration import Calibration, ExampleInputs
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.calls import Outputs
from c2m3_fl.network.copying import own_names
from c2m3_fl.symmetry.discover import permutation_spec, require_invariance


@dataclass(frozen=True, eq=False)
class Merge:
    """A merged network.

    Attributes
    ----------
    state_dict : dict of str to Tensor
        Loads into the model.
    match : Match, optional
        Each node's permutation into the universe; None for methods that have none.
    report : MergeReport
        What was done.
    """

    state_dict: dict[str, Tensor] = field(repr=False)
    match: Match | None = field(repr=False)
    report: MergeReport

    def __str__(self) -> str:
        return str(self.report)


def merge(
    model: nn.Module,
    state_dicts: Sequence[Params],
    *,
    example_inputs: ExampleInputs | None = None,
    weights: Sequence[float] | Tensor | None = None,
    calibration: Calibration | CalibrationSet | None = None,
    inputs: Sequence[str] | None = None,
    outputs: Outputs | None = None,
    recalibrate: Recalibration | str | None = None,
    moments: Sequence[OwnMoments] | None = None,
    method: Method | str = "c2m3",
    basis: int | None = None,
    spec: PermutationSpec | None = None,
    start: MergeStart = "auto",
    device: torch.device | str | None = None,
) -> Merge:
    """Merge networks that were trained apart: permute their units into one universe, average, recalibrate.

    The result does not depend on the order of the nodes, and merging identical nodes changes nothing.

    Parameters
    ----------
    model : nn.Module
        The architecture that all nodes share; not mutated.
    state_dicts : sequence of mappings of str to Tensor
        The nodes' state dicts; not mutated.
    example_inputs : Tensor, tuple or dict, optional
        The arguments of one call: a tensor, a tuple of arguments, or a dict of keyword arguments. By default the
        inputs of the first calibration batch.
    weights : sequence of float, optional
        Averaging weights, one per node (numbers of training examples, say); equal by default.
    calibration : iterable of batches, optional
        Inputs like those the network will see: a list or a ``DataLoader`` of tensors, of tuples that start with the
        network's inputs, or of dicts whose keys are the network's arguments. "auto" decides by labels; refit takes them
        as the sign that outputs are class scores.
    inputs : sequence of str, optional
        The keys that are inputs, for dict batches with other keys than the network's arguments and "label".
    outputs : str, int or sequence of them, optional
        The outputs that the caller reads, by key, field or place: ``"logits"``. By default all tensors among them.
    recalibrate : Recalibration or str, optional
        What to do with the calibration data: ``Auto()``, ``Repair()``, ``Refit()``, ``BatchNormStatistics()``, or a
        short name: "auto", "repair", "refit", "batchnorm", "none". By default REPAIR with data, nothing without.
    moments : sequence of mappings, optional
        Each node's `channel_moments` on its own data. Only for "auto", which compares them with those on the
        calibration data to detect a shift.
    method : Method or str
        How the nodes are aligned: an object of `c2m3_fl.merging.align.methods`, or its short name.
    basis : int, optional
        The node whose order of units the result has; by default the heaviest, ties broken by content.
    spec : PermutationSpec, optional
        The network's symmetries; by default derived by `permutation_spec`. A given one is proven on the inputs, if
        there are any.
    start : str or sequence of Permutation
        Where the match of method "c2m3" starts: see `match`, or "activations", which compares units by their outputs
        on the calibration data and gave better merges of deep networks. Only with ``method="c2m3"``.
    device : torch.device or str, optional
        Where to compute; by default where the first node is.

    Raises
    ------
    ParamsError
        When there is no node, keys, shapes or types differ from the model's or among the nodes, or a value is not
        finite.
    SpecError
        When the given spec allows a permutation that changes the network's outputs.
    WeightsError, CalibrationError, ConfigError
        When weights, calibration data or options are not usable.
    TraceError
        When the network cannot be exported.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> node = model.state_dict()
    >>> order = torch.randperm(8)
    >>> twin = {"0.weight": node["0.weight"][order], "0.bias": node["0.bias"][order],
    ...         "2.weight": node["2.weight"][:, order], "2.bias": node["2.bias"]}
    >>> merged = merge(model, [node, twin], example_inputs=torch.randn(2, 4), basis=0)
    >>> all(torch.equal(merged.state_dict[name], node[name]) for name in node)
    True
    """
    begin = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is {model!r}, expected a module such as Net()")
    aligner = resolve_method(_started(method, start))
    if moments is not None and not (isinstance(resolve(recalibrate), Auto) and calibration is not None):
        raise ConfigError('only recalibrate="auto" with calibration data uses moments: leave them out, or pass both')
    recalibration = resolve_for(recalibrate, data=calibration is not None)
    state_dicts = [own_names(model, node) for node in state_dicts]
    share = _check(model, state_dicts, weights, basis)
    held = None
    if spec is None or calibration is not None or example_inputs is not None:
        held = CalibrationSet.of(model, calibration, example_inputs=example_inputs, inputs=inputs, outputs=outputs)
        model = held.model
    spec = _proven(model, spec, held)
    home = next(iter(state_dicts[0].values())).device
    place = home if device is None else usable_device(device)
    order = order_by_weight(state_dicts, share)
    nodes = Nodes(
        spec,
        tuple(to_device(node, place) for node in state_dicts),
        share,
        tuple(order),
        order[0] if basis is None else basis,
        model,
        held.to(place) if held is not None and held.batches else None,
    )
    alignment = aligner(nodes)
    if moments is not None and alignment.moves is None:
        raise ConfigError(f"moments cannot be mapped by the linear maps of method {method!r}: leave them out")
    merged = weighted_mean([alignment.params[index] for index in order], share[order])
    report = None
    if recalibration is not None and nodes.calibration is not None:
        done = short_names.recalibrate(recalibration, _setting(nodes, nodes.calibration, alignment, merged, moments))
        merged, report = done.state_dict, done.report
    seconds = time.perf_counter() - begin
    versions = model.state_dict()  # has the modules' versions, which some modules read when they load it
    versions.update(to_device(merged, home))
    return Merge(versions, alignment.match, _report(nodes, alignment, report, seconds))


def _started(method: Method | str, start: MergeStart) -> Method | str:
    if method == "c2m3":
        return CycleConsistent(start=start)
    if not (isinstance(start, str) and start == "auto"):
        raise ConfigError(f"start is for method 'c2m3', not for {method!r}; leave it out, or set it on the method")
    return method


def _setting(
    nodes: Nodes,
    calibration: CalibrationSet,
    alignment: Alignment,
    merged: Params,
    moments: Sequence[OwnMoments] | None,
) -> Setting:
    """The setting of the recalibration."""
    plain = weighted_mean([nodes.params[index] for index in nodes.order], nodes.weights[list(nodes.order)])
    endpoints, views = alignment.params, None
    if alignment.seen is not None:
        endpoints, views = zip(*alignment.seen, strict=True)
    setting = prepare(nodes.model, merged, endpoints, calibration, weights=nodes.weights, plain=plain, views=views)
    if moments is None:
        return setting
    assert alignment.moves is not None  # the caller has refused moments without permutations
    return with_own_moments(setting, nodes.spec, alignment.moves, moments)


def _proven(model: nn.Module, spec: PermutationSpec | None, held: CalibrationSet | None) -> PermutationSpec:
    if spec is not None and not isinstance(spec, PermutationSpec):
        raise ConfigError(
            f"spec is a {type(spec).__name__}, expected a PermutationSpec; from_json(text) reads a saved one"
        )
    if spec is None:
        assert held is not None
        return permutation_spec(model, held.example_inputs)
    if held is not None:
        require_invariance(model, spec, held.example_inputs)
    return spec


def _check(
    model: nn.Module, nodes: Sequence[Params], weights: Sequence[float] | Tensor | None, basis: int | None
) -> Tensor:
    if not nodes:
        raise ParamsError("state_dicts: got none, expected at least one node to merge")
    for index, node in enumerate(nodes):
        check_params(model, node, f"node {index}")
        check_types(nodes[0], node, f"node {index}")
    if basis is not None and not _indexes(basis, len(nodes)):
        raise ConfigError(f"basis is {basis!r}, expected the index of one of the {len(nodes)} nodes")
    return normalise_weights(weights, len(nodes))


def _indexes(value: object, count: int) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and 0 <= int(value) < count


def _report(
    nodes: Nodes, alignment: Alignment, recalibration: RecalibrationReport | None, seconds: float
) -> MergeReport:
    share = nodes.weights.tolist()
    layers = consensus(nodes.spec, alignment.params, share).layers if len(share) > 1 else {}
    found, moves = alignment.match, alignment.moves
    notes = list(alignment.notes)
    if recalibration is None and not nodes.batches:
        notes.append("nothing was recalibrated: there are no calibration data")
    if recalibration is None and any(name.endswith("running_var") for name in nodes.spec.tensors):
        notes.append(
            "BatchNorm statistics are means over the nodes, wrong for the merged network; recalibrate with data"
        )
    return MergeReport(
        nodes=len(nodes.params),
        basis=nodes.basis,
        weights=tuple(share),
        objectives=None if found is None or not layers else (found.objectives[0], found.objectives[-1]),
        share_moved=None if moves is None else tuple(permutation.share_moved(move) for move in moves),
        layers={name: tuple(row.tolist()) for name, row in layers.items()},
        recalibration=recalibration,
        notes=tuple(notes),
        match_seconds=alignment.seconds,
        seconds=seconds,
    )
