"""Merge networks of different widths: match them padded, average per entry, recalibrate, cut to the wanted width."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from c2m3_fl.core.averaging import normalise_weights
from c2m3_fl.core.permutation import identity
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.state_dicts import order_by_weight, to_device
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.align.base import Method, Nodes
from c2m3_fl.merging.align.cca import CCA
from c2m3_fl.merging.align.methods import ActivationMatching, CycleConsistent
from c2m3_fl.merging.merged import Merge, merge_report
from c2m3_fl.merging.recalibrate import short_names
from c2m3_fl.merging.recalibrate.setting import check_params, check_types, prepare, usable_device
from c2m3_fl.merging.recalibrate.short_names import Recalibration
from c2m3_fl.merging.reports import Recalibrated, RecalibrationReport
from c2m3_fl.merging.widths.endpoints import owned_channels, seen_from
from c2m3_fl.merging.widths.injections import Injection, between, carry, injection, without_dead_units
from c2m3_fl.merging.widths.maps import WidthMaps
from c2m3_fl.merging.widths.networks import Network, Widths
from c2m3_fl.merging.widths.owners import average, reading_axes
from c2m3_fl.merging.widths.select import chosen_units
from c2m3_fl.network.copying import own_names
from c2m3_fl.network.operators import Kind


def merge_widths(
    widths: Widths,
    state_dicts: Sequence[Params],
    *,
    weights: Sequence[float] | Tensor | None,
    recalibration: Recalibration | None,
    method: Method,
    basis: int | None,
    device: torch.device | str | None,
) -> Merge:
    """Merge networks that differ in width alone.

    Parameters
    ----------
    widths : Widths
        Their architectures.
    state_dicts : sequence of mappings of str to Tensor
        One per node; not mutated.
    weights, basis, device
        See `merge`.
    recalibration : Recalibration, optional
        What to do with the calibration data.
    method : Method
        How the padded nodes are aligned.

    Raises
    ------
    ConfigError
        When the method gives no permutations.
    ParamsError, WeightsError, SpecError
        See `merge`.
    """
    begin = time.perf_counter()
    state_dicts = [own_names(each.held.model, node) for each, node in zip(widths.nodes, state_dicts, strict=True)]
    for index, (network, node) in enumerate(zip(widths.nodes, state_dicts, strict=True)):
        check_params(network.held.model, node, f"node {index}")
        check_types(state_dicts[0], node, f"node {index}")
    share = normalise_weights(weights, len(state_dicts))
    place = next(iter(state_dicts[0].values())).device if device is None else usable_device(device)
    own = [to_device(node, place) for node in state_dicts]
    nodes = _padded(widths, own, share, basis, place)
    alignment = method(nodes)
    if alignment.moves is None:
        raise ConfigError(f"method {method!r} gives no permutations, which networks of different widths need")
    specs, wide = [network.spec for network in widths.nodes], widths.wide.spec
    whole = [injection(spec, wide, move) for spec, move in zip(specs, alignment.moves, strict=True)]
    units = [without_dead_units(*each) for each in zip(specs, own, whole, strict=True)]
    reads = reading_axes(wide, widths.wide.programs[0], units)
    order = list(nodes.order)
    merged = _average(specs, wide, units, own, share, reads, order)
    alignment = replace(alignment, notes=(*alignment.notes, *_notes(widths, units, recalibration is not None)))
    report = None
    if recalibration is not None and widths.wide.held.batches:
        start = [injection(spec, wide, identity(wide)) for spec in specs]
        plain = _average(specs, wide, start, own, share, reads, order)
        done = _recalibrate(recalibration, widths, merged, plain, own, units, share, order)
        merged, report = done.state_dict, done.report
    if widths.cuts:
        chosen = _chosen(widths, merged, whole)
        merged, done_again = cut(widths.wide, widths.result, merged, chosen, recalibration)
        report = done_again or report
    versions = widths.result.held.model.state_dict()  # has the modules' versions
    versions.update(to_device(merged, next(iter(state_dicts[0].values())).device))
    whole_report = merge_report(nodes, alignment, report, time.perf_counter() - begin)
    return Merge(versions, alignment.match, whole_report, WidthMaps(tuple(specs), tuple(units)))


def check_method(method: Method) -> None:
    """Raise `ConfigError` for a method that compares activations."""
    activations = isinstance(method, (ActivationMatching, CCA))
    if activations or (isinstance(method, CycleConsistent) and method.start == "activations"):
        raise ConfigError(
            f"{method!r} compares activations of networks of one width; networks of different widths are matched by "
            "their weights: use 'c2m3', 'git-rebasin' or 'mergemany'"
        )


def _padded(widths: Widths, own: Sequence[Params], share: Tensor, basis: int | None, place: torch.device) -> Nodes:
    """The nodes, padded with dead units."""
    wide = widths.wide.spec
    padded = [
        carry(network.spec, wide, injection(network.spec, wide, identity(wide)), node)
        for network, node in zip(widths.nodes, own, strict=True)
    ]
    order = order_by_weight(padded, share)
    if basis is None:
        widest = [index for index in order if widths.nodes[index] is widths.wide]
        basis = (widest or order)[0]
    held = widths.wide.held
    calibration = held.to(place) if held.batches else None
    return Nodes(wide, tuple(padded), share, tuple(order), basis, held.model, calibration)


def _average(
    specs: Sequence[PermutationSpec],
    wide: PermutationSpec,
    units: Sequence[Injection],
    own: Sequence[Params],
    share: Tensor,
    reads: Mapping[str, int],
    order: Sequence[int],
) -> dict[str, Tensor]:
    """The average of the nodes, summed in canonical order."""
    carried = [carry(specs[index], wide, units[index], own[index]) for index in order]
    placed = [units[index] for index in order]
    return average([specs[index] for index in order], wide, placed, carried, share[list(order)], reads)


def _recalibrate(
    recalibration: Recalibration,
    widths: Widths,
    merged: Params,
    plain: Params,
    own: Sequence[Params],
    units: Sequence[Injection],
    share: Tensor,
    order: Sequence[int],
) -> Recalibrated:
    """Recalibrate the average by the nodes' outputs, each at its own width, seen in the units of the average."""
    wide, networks = widths.wide, [widths.nodes[index] for index in order]
    specs, placed = [network.spec for network in networks], [units[index] for index in order]
    setting = prepare(wide.held.model, merged, [merged], wide.held, plain=plain)
    setting = replace(
        setting,
        endpoints=tuple(own[index] for index in order),
        weights=share[list(order)],
        order=tuple(order),
        views=tuple(seen_from(spec, wide.spec, each) for spec, each in zip(specs, placed, strict=True)),
        sources=tuple(network.held.to(setting.device).programs for network in networks),
        owned=owned_channels(specs, wide.spec, placed),
    )
    return short_names.recalibrate(recalibration, setting)


def _chosen(widths: Widths, merged: Params, whole: Sequence[Injection]) -> dict[str, Tensor]:
    """For every unit of the result the place in the average that it is taken from."""
    spec, wide = widths.result.spec, widths.wide
    if widths.node is None:
        return chosen_units(wide, spec, merged)
    every = {name: torch.arange(group.size) for name, group in wide.spec.groups.items()}
    return between(whole[widths.node], every, {name: group.size for name, group in spec.groups.items()})


def cut(
    wide: Network, narrow: Network, params: Params, chosen: Injection, recalibration: Recalibration | None
) -> tuple[dict[str, Tensor], RecalibrationReport | None]:
    """Restrict a network to some of its units, and recalibrate that by the outputs of the whole network.

    Parameters
    ----------
    wide, narrow : Network
        The network and the one that its restriction fits.
    params : mapping of str to Tensor
        State dict of the network; not mutated.
    chosen : mapping of str to Tensor
        For every unit of `narrow` the unit of the network that it is.
    recalibration : Recalibration, optional
        What to do with the calibration data; without either the restriction stays as it is.
    """
    restricted = carry(wide.spec, narrow.spec, chosen, params)
    if recalibration is None or not wide.held.batches:
        return restricted, None
    setting = prepare(narrow.held.model, restricted, [restricted], narrow.held)
    setting = replace(
        setting,
        endpoints=(params,),
        views=(seen_from(wide.spec, narrow.spec, chosen),),
        sources=(wide.held.to(setting.device).programs,),
    )
    done = short_names.recalibrate(recalibration, setting)
    return done.state_dict, done.report


def _notes(widths: Widths, units: Sequence[Injection], recalibrated: bool) -> tuple[str, ...]:
    """What the user should know of a merge of different widths."""
    shares = WidthMaps(tuple(network.spec for network in widths.nodes), tuple(units)).shares
    notes = [f"units of the widest network that each network has: {', '.join(f'{share:.0%}' for share in shares)}"]
    norms = [each.module for each in widths.wide.programs[0].operators if each.kind is Kind.NORM]
    if norms and not recalibrated:
        notes.append(
            f"{', '.join(norms)} divide by numbers that depend on the width; pass calibration data to correct them"
        )
    return tuple(notes)
