"""Refit from clients of several widths: of the model by their replies, then of every narrower width by the model.

Clients run networks of the model's width, those of a narrower one padded with dead units, which compute the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from logging import ERROR, INFO

import torch
from flwr.serverapp import Grid
from flwr.supercore import log

from c2m3_fl.core import permutation
from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import check_finite
from c2m3_fl.errors import CalibrationError
from c2m3_fl.flower.acceptance import check_runs
from c2m3_fl.flower.aligning.aligned_replies import AlignedReplies
from c2m3_fl.flower.generators import undisturbed
from c2m3_fl.flower.queries.corrections import Owners
from c2m3_fl.flower.queries.refit import ClientRefit, RegMean, refit_by_clients
from c2m3_fl.flower.widths.padding import Padding, computes_alike, placed
from c2m3_fl.flower.widths.rounds import RoundWidths
from c2m3_fl.flower.widths.stage import Resizing
from c2m3_fl.flower.wrapped import typed_like
from c2m3_fl.merging.recalibrate.from_clients.pool import far_networks
from c2m3_fl.merging.reports import Recalibrated
from c2m3_fl.merging.widths.endpoints import owned_channels
from c2m3_fl.merging.widths.injections import Injection, carry
from c2m3_fl.merging.widths.networks import Network
from c2m3_fl.network.program import Program
from c2m3_fl.network.rows import weight_matrix


def refit_by_replies(
    widths: RoundWidths,
    aligned: AlignedReplies,
    options: ClientRefit | RegMean,
    grid: Grid,
    nodes: Sequence[int],
    program: Program,
    merged: Params,
    weights: Sequence[float],
    *,
    equally: bool,
) -> Recalibrated:
    """Refit a merged network by replies of several widths: see `refit_by_clients`.

    Parameters
    ----------
    widths : RoundWidths
        Of the replies.
    aligned : AlignedReplies
        What was merged.
    options, grid, nodes, program, merged, weights, equally
        As for `refit_by_clients`.
    """
    replies, owners = padded_replies(widths, aligned) if any(aligned.narrow) else (aligned.params, None)
    further = len({*widths.places.values()} - {0})
    return refit_by_clients(
        options, grid, nodes, program, merged, replies, weights, equally=equally, owners=owners, further=further
    )


def padded_replies(widths: RoundWidths, aligned: AlignedReplies) -> tuple[list[Params], Owners]:
    """The replies as clients run them, entries that they lack zero; and who has which channels.

    Parameters
    ----------
    widths : RoundWidths
        Of these replies.
    aligned : AlignedReplies
        As the wrapped strategy got them.
    """
    networks, wide = widths.sizes.networks, widths.sizes.networks[0]
    whole = {name: torch.arange(group.size) for name, group in wide.spec.groups.items()}
    replies: list[Params] = [
        permutation.apply(wide.spec, move, reply.params)
        for move, reply in zip(aligned.moves, aligned.replies, strict=True)
    ]
    places = [0 if narrow is None else narrow.place for narrow in aligned.narrow]
    units = [whole if narrow is None else narrow.units for narrow in aligned.narrow]
    far: set[int] = set()
    for place in set(places):  # weights of narrower networks are larger: fewer units make the same sums
        alike = [index for index, other in enumerate(places) if other == place]
        far |= {alike[index] for index in far_networks(wide.held.program, [replies[index] for index in alike])}
    channels = owned_channels([networks[place].spec for place in places], wide.spec, units)
    return replies, Owners(channels, tuple(sorted(far)))


@dataclass(frozen=True, eq=False)
class Asked:
    """Whom a refit asks.

    Attributes
    ----------
    options : ClientRefit or RegMean
        What to ask.
    grid : Grid
        Where the clients are.
    weights : mapping of int to float
        Whom, and what each node counts.
    equally : bool
        Whether the strategy ignores the weights.
    """

    options: ClientRefit | RegMean
    grid: Grid
    weights: Mapping[int, float]
    equally: bool


def refit_widths(resizing: Resizing, deployed: Params, asked: Asked) -> int:
    """Refit the restrictions of a deployed model to the widths that nodes have, and remember them.

    Every client runs the model and its restriction on its own data, so that all count for all units. A restriction
    that cannot be refit stays as it is without clients. Nodes that left one refit before its end are not asked for the
    next.

    Parameters
    ----------
    resizing : Resizing
        The widths; takes the result.
    deployed : mapping of str to Tensor
        State dict of the model; not mutated.
    asked : Asked
        Whom to ask.

    Returns
    -------
    int
        How many restrictions could not be refit.
    """
    failed = 0
    cuts, found = resizing.cuts(deployed, deployed=False), {}
    for place in sorted({*resizing.places.values()} - {0}):
        name = resizing.sizes.networks[place].name
        try:
            with undisturbed():
                wide, narrow = resizing.sizes.networks[0], resizing.sizes.networks[place]
                found[place], answered = refit_restriction(wide, narrow, cuts.units(place), deployed, asked)
        except Exception as error:  # whatever fails, there is the restriction without clients
            failed += 1
            text = "\t> the model at the width of %s is not refit by the clients: %s: %s"
            log(ERROR, text, name, type(error).__name__, error)
        else:
            asked = replace(asked, weights={node: asked.weights[node] for node in answered})
            log(INFO, "\t> the model at the width of %s is refit by the clients", name)
    resizing.keep(deployed, found)
    return failed


def refit_restriction(
    wide: Network, narrow: Network, units: Injection, deployed: Params, asked: Asked
) -> tuple[Params, tuple[int, ...]]:
    """A model restricted to some of its units, and refit to what the whole model gives on the clients' data.

    Parameters
    ----------
    wide, narrow : Network
        The model and the network that its restriction fits.
    units : mapping of str to Tensor
        For every unit of `narrow` the unit of the model that it is.
    deployed : mapping of str to Tensor
        State dict of the model; not mutated.
    asked : Asked
        Whom to ask.

    Returns
    -------
    (mapping of str to Tensor, tuple of int)
        State dict of `narrow`, and the nodes whose answers were of use and that answered to the end.

    Raises
    ------
    CalibrationError
        When no client gave a usable answer, or the result would depend on units that it does not have.
    """
    whole = typed_like(wide.held.model.state_dict(), deployed)
    restricted, seats = carry(wide.spec, narrow.spec, units, whole), placed(wide.spec, units)
    kept = owned_channels([narrow.spec], wide.spec, [seats])
    ones = {name: torch.ones(tensor.shape) for name, tensor in narrow.spec.tensors.items()}
    live = carry(narrow.spec, wide.spec, seats, ones)
    done = refit_by_clients(
        asked.options,
        asked.grid,
        list(asked.weights),
        wide.held.program,
        Padding(narrow.spec, wide.spec, seats)(restricted, whole),
        [whole] * len(asked.weights),
        list(asked.weights.values()),
        equally=asked.equally,
        owners=Owners(
            lambda operator: kept(operator).expand(len(asked.weights), -1),
            inputs=lambda operator: weight_matrix(operator, live[operator.weight]).any(-1),
        ),
        title=f"the model at the width of {narrow.name}",
    )
    found = carry(wide.spec, narrow.spec, units, done.state_dict)
    check_finite(found)
    check_runs(narrow.held.model, narrow.held.example, found, restricted)
    if not computes_alike(wide, narrow, done.state_dict, found):
        raise CalibrationError("the fit makes use of units that this width does not have")
    return found, done.report.nodes
