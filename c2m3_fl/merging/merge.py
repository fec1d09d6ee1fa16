"""Models in, model out: match, average in one basis, recalibrate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor, nn

from c2m3_fl.core.averaging import normalise_weights, weighted_mean
from c2m3_fl.core.permutation import is_identity
from c2m3_fl.core.spec import Params, PermutationSpec, check_rotations
from c2m3_fl.core.state_dicts import order_by_weight, to_device
from c2m3_fl.errors import ConfigError, ParamsError
from c2m3_fl.merging.align.base import Alignment, Method, Nodes
from c2m3_fl.merging.align.methods import CycleConsistent, MergeStart, resolve_method
from c2m3_fl.merging.merge_widths import check_method, merge_widths
from c2m3_fl.merging.merged import Merge, merge_report
from c2m3_fl.merging.recalibrate import short_names
from c2m3_fl.merging.recalibrate.auto import Auto
from c2m3_fl.merging.recalibrate.setting import Setting, check_params, check_types, prepare, usable_device
from c2m3_fl.merging.recalibrate.shift import OwnMoments, with_own_moments
from c2m3_fl.merging.recalibrate.short_names import Recalibration, resolve, resolve_for
from c2m3_fl.merging.widths.networks import Widths, check_models, one_width
from c2m3_fl.network.calibration import Calibration, ExampleInputs
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.calls import Outputs
from c2m3_fl.network.copying import own_names
from c2m3_fl.symmetry.discover import permutation_spec, require_invariance
from c2m3_fl.symmetry.folding import Folding, find_folding


def merge(
    model: nn.Module | None = None,
    state_dicts: Sequence[Params] = (),
    *,
    models: Sequence[nn.Module] | None = None,
    width: nn.Module | int | None = None,
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
    rotations: bool = False,
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
    models : sequence of nn.Module, optional
        In place of `model`, one per node: the same architecture in different widths. A module that stands there several
        times is traced once.
    width : int or nn.Module, optional
        The width of the result, with `models`: that of a node, by its number, or of another module; by default the
        widest. A narrower node's result has this node's units, in its order.
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
    rotations : bool
        Whether groups that linear operators alone read (residual streams, the insides of heads) are rotated instead of
        permuted. Norms are folded first, see `fold`: where anything moves, their scales are one in the result.
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
        When the given spec allows a permutation that changes the network's outputs, or `models` differ in more than
        their width.
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
    aligner = resolve_method(_started(method, start))
    if models is not None or width is not None:
        state_dicts = list(state_dicts)
        models = check_models(model, models, state_dicts, width)
        if not one_width(models, width):
            if spec is not None or moments is not None or rotations:
                raise ConfigError(
                    "spec, moments and rotations are for nodes of one width; leave them out for different widths"
                )
            check_method(aligner)
            _check_basis(basis, len(state_dicts))
            return merge_widths(
                Widths.of(models, width, calibration, example_inputs=example_inputs, inputs=inputs, outputs=outputs),
                state_dicts,
                weights=weights,
                recalibration=resolve_for(recalibrate, data=calibration is not None),
                method=aligner,
                basis=basis,
                device=device,
            )
        model = models[0]
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is {model!r}, expected a module such as Net()")
    if moments is not None and not (isinstance(resolve(recalibrate), Auto) and calibration is not None):
        raise ConfigError('only recalibrate="auto" with calibration data uses moments: leave them out, or pass both')
    recalibration = resolve_for(recalibrate, data=calibration is not None)
    state_dicts = [own_names(model, node) for node in state_dicts]
    share = _check(model, state_dicts, weights, basis)
    held = None
    if spec is None or calibration is not None or example_inputs is not None:
        held = CalibrationSet.of(model, calibration, example_inputs=example_inputs, inputs=inputs, outputs=outputs)
        model = held.model
    spec = _proven(model, spec, held, rotations)
    folding = _folding(model, spec, held)
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
    alignment = _aligned(nodes, aligner, folding)
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
    return Merge(versions, alignment.match, merge_report(nodes, alignment, report, seconds))


def _check_basis(basis: int | None, count: int) -> None:
    if basis is not None and not _indexes(basis, count):
        raise ConfigError(f"basis is {basis!r}, expected the index of one of the {count} nodes")


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


def _folding(model: nn.Module, spec: PermutationSpec, held: CalibrationSet | None) -> Folding | None:
    """The folding that a spec with rotations is of; None for permutations alone."""
    if not spec.rotations:
        return None
    if held is None:
        raise ConfigError(
            f"group {spec.rotations[0]!r} of the spec rotates, for which norms are folded by the network's graph; pass "
            "example_inputs, or calibration data"
        )
    return find_folding(model, held.example_inputs)


def _aligned(nodes: Nodes, aligner: Method, folding: Folding | None) -> Alignment:
    """The nodes in one basis, folded where anything moves; if nothing does, they are as they were, bit for bit."""
    if folding is None:
        return aligner(nodes)
    alignment = aligner(replace(nodes, params=tuple(folding.fold(node) for node in nodes.params)))
    still = alignment.moves is not None and all(map(is_identity, alignment.moves))
    return replace(alignment, params=nodes.params) if still else alignment


def _proven(
    model: nn.Module, spec: PermutationSpec | None, held: CalibrationSet | None, rotations: bool
) -> PermutationSpec:
    if spec is not None and not isinstance(spec, PermutationSpec):
        raise ConfigError(
            f"spec is a {type(spec).__name__}, expected a PermutationSpec; from_json(text) reads a saved one"
        )
    if spec is None:
        assert held is not None
        return permutation_spec(model, held.example_inputs, rotations=rotations)
    check_rotations(spec, rotations=rotations)
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
    _check_basis(basis, len(nodes))
    return normalise_weights(weights, len(nodes))


def _indexes(value: object, count: int) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and 0 <= int(value) < count
