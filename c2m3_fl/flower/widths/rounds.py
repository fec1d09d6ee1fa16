"""Replies of narrower clients among those of the model's width: who has which entry, and what fills the others.

A wrapped strategy takes tensors of one shape. An entry that a reply lacks is filled so that the strategy's result is
that of the replies that have it: with their weighted mean under strategies that average, with their median under
coordinatewise robust ones. Strategies that select whole replies by distance are given, outside of the entries that all
replies have, the model that was sent. So is every strategy in entries that no reply has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.averaging import mean_of_owners
from c2m3_fl.core.basis import consensus
from c2m3_fl.core.outliers import find_outliers
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.state_dicts import to_device
from c2m3_fl.flower.aligning.aligned_replies import AlignedReplies, Narrow
from c2m3_fl.flower.incoming.sybils import votes_by_distance
from c2m3_fl.flower.round_match import RoundMatch
from c2m3_fl.flower.widths.sizes import Cuts, Sizes
from c2m3_fl.flower.wrapped import ignores_weights
from c2m3_fl.merging.recalibrate.setting import Setting
from c2m3_fl.merging.widths.endpoints import owned_channels, seen_from
from c2m3_fl.merging.widths.injections import Injection, carry, owned_entries


@dataclass(frozen=True, eq=False)
class RoundWidths:
    """The widths of a round's replies.

    Attributes
    ----------
    sizes : Sizes
        All widths.
    cuts : Cuts
        The model that was sent, at every width.
    places : mapping of int to int
        By node, the width that it replied with.
    """

    sizes: Sizes
    cuts: Cuts
    places: Mapping[int, int]
    _masks: dict[tuple[object, ...], dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def settle(
        self, nodes: Sequence[int], match: RoundMatch, weights: Sequence[float]
    ) -> tuple[RoundMatch, tuple[Narrow | None, ...]]:
        """The match, entries that a reply lacks as they were sent and units that it lacks at rest; and every width.

        Parameters
        ----------
        nodes : sequence of int
            Who replied.
        match : RoundMatch
            Of the padded replies.
        weights : sequence of float
            Averaging weights.
        """
        narrow = [self._narrow(node, move) for node, move in zip(nodes, match.moves, strict=True)]
        if not any(narrow):
            return match, tuple(narrow)
        spec, params, moves = self.sizes.spec, list(match.params), list(match.moves)
        for index, own in enumerate(narrow):
            if own is None:
                continue
            move = _at_rest(spec, match.moves[index], self.cuts.injection(own.place))
            back = permutation.compose(move, permutation.invert(match.moves[index]))
            narrow[index] = replace(own, units={name: units[back[name]] for name, units in own.units.items()})
            owned = self._owned(narrow[index])
            aligned = permutation.apply(spec, back, match.params[index])
            params[index] = {
                name: torch.where(owned[name], value, match.sent[name].to(value.dtype)) if name in owned else value
                for name, value in aligned.items()
            }
            moves[index] = move
        agreed = consensus(spec, params, weights)
        settled = replace(match, params=tuple(params), moves=tuple(moves), consensus=agreed)
        return settled, tuple(narrow)

    def outliers(self, match: RoundMatch, narrow: Sequence[Narrow | None]) -> dict[int, str]:
        """The replies that do not fit the others of their width.

        Weights of honest networks differ in size and in direction from width to width: those of fewer units are larger.

        Parameters
        ----------
        match : RoundMatch
            Settled.
        narrow : sequence of Narrow or None
            The widths of the replies.
        """
        places = [0 if own is None else own.place for own in narrow]
        odd: dict[int, str] = {}
        for place in set(places):
            alike = [index for index, other in enumerate(places) if other == place]
            found = find_outliers(self.sizes.spec, [match.params[index] for index in alike], match.sent)
            odd |= {alike[index]: reason for index, reason in found.items()}
        return {index: odd[index] for index in sorted(odd)}

    def filled(self, aligned: AlignedReplies, sent: Params, strategy: object) -> AlignedReplies:
        """The replies as the wrapped strategy gets them.

        Parameters
        ----------
        aligned : AlignedReplies
            Settled.
        sent : mapping of str to Tensor
            The model that was sent out.
        strategy : Strategy
            The wrapped strategy.
        """
        if not any(aligned.narrow):
            return aligned
        common, median = votes_by_distance(strategy), ignores_weights(strategy)
        owned = [self._owned(own) for own in aligned.narrow]
        params: list[dict[str, Tensor]] = [dict(each) for each in aligned.params]
        for name in owned[next(place for place, own in enumerate(aligned.narrow) if own is not None)]:
            values = [each[name] for each in params]
            masks = [own.get(name, torch.ones((), dtype=torch.bool)).expand(values[0].shape) for own in owned]
            if common:
                shared = torch.stack(masks).all(0)
                masks = [shared] * len(masks)
                fill = sent[name].to(values[0].dtype)
            else:
                fill = _median(values, masks) if median else mean_of_owners(values, list(aligned.weights), masks)
                fill = torch.where(torch.stack(masks).any(0), fill, sent[name].to(values[0].dtype))
            for each, value, mask in zip(params, values, masks, strict=True):
                each[name] = value if bool(mask.all()) else torch.where(mask, value, fill)
        return replace(aligned, params=tuple(params))

    def at_own_widths(self, setting: Setting, aligned: AlignedReplies) -> Setting:
        """The setting of a recalibration in which every narrower reply runs at its own width.

        Parameters
        ----------
        setting : Setting
            Of the aggregate, with the replies as the wrapped strategy got them.
        aligned : AlignedReplies
            These replies.
        """
        wide = self.sizes.networks[0]
        whole = {name: torch.arange(group.size) for name, group in wide.spec.groups.items()}
        endpoints: list[Params] = []
        views, sources, specs, units = [], [], [], []
        for index in setting.order:
            own, params = aligned.narrow[index] or Narrow(0, whole), aligned.replies[index].params
            network = self.sizes.networks[own.place]
            if own.place:  # as it came, without what it was padded with
                found = carry(wide.spec, network.spec, self.cuts.units(own.place), params)
            else:
                found = permutation.apply(wide.spec, aligned.moves[index], params)
            endpoints.append(to_device(found, setting.device))
            views.append(seen_from(network.spec, wide.spec, own.units))
            sources.append(network.held.to(setting.device).programs)
            specs.append(network.spec)
            units.append(own.units)
        owned = owned_channels(specs, wide.spec, units)
        return replace(setting, endpoints=tuple(endpoints), views=tuple(views), sources=tuple(sources), owned=owned)

    def _narrow(self, node: int, move: Permutation) -> Narrow | None:
        place = self.places.get(node, 0)
        if not place:
            return None
        return Narrow(place, {name: units[move[name]] for name, units in self.cuts.injection(place).items()})

    def _owned(self, narrow: Narrow | None) -> dict[str, Tensor]:
        """By name of a tensor that has units, which of its entries a reply has; empty for one that has all."""
        if narrow is None:
            return {}
        key = (narrow.place, *(units.numpy().tobytes() for units in narrow.units.values()))
        if key not in self._masks:
            own, wide = self.sizes.networks[narrow.place].spec, self.sizes.spec
            self._masks[key] = {
                name: owned_entries(name, own, wide, narrow.units)
                for name, tensor in wide.tensors.items()
                if any(tensor.axes)
            }
        return self._masks[key]


def _median(values: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Median of every entry over the values that own it; zero where none does."""
    stacked = np.stack(
        [np.where(mask.numpy(), value.numpy(), np.nan) for value, mask in zip(values, masks, strict=True)]
    )
    nobody = np.isnan(stacked).all(0)
    stacked[0][nobody] = 0
    return torch.from_numpy(np.nanmedian(stacked, axis=0)).to(values[0].dtype)


def _at_rest(spec: PermutationSpec, move: Permutation, units: Injection) -> dict[str, Tensor]:
    """A map of a padded reply that moves units which the reply has as before, and the others as little as possible.

    Parameters
    ----------
    spec : PermutationSpec
        The model's symmetries.
    move : Permutation
        Of the padded reply.
    units : mapping of str to Tensor
        For every unit of the padded reply the reply's own, or -1.
    """
    found: dict[str, Tensor] = {}
    for name in spec.groups:
        group = spec.groups[name]
        alive = units[name] >= 0
        if group.parent is None:
            found[name] = _rested(move[name], alive)
    for name, group in spec.groups.items():
        if group.parent is None:
            continue
        blocks = found[group.parent]
        size = group.size // len(blocks)
        index, alive = move[name].reshape(len(blocks), size), (units[name] >= 0).reshape(len(blocks), size)
        rows = []
        for place, block in enumerate(blocks.tolist()):
            inner = index[place] - block * size if block == move[group.parent][place] else torch.arange(size)
            rows.append(_rested(inner, alive[block]) + block * size)
        found[name] = torch.cat(rows)
    return {name: found[name] for name in spec.groups}


def _rested(index: Tensor, alive: Tensor) -> Tensor:
    """The same places for live units; dead ones stay at their own places where these are free."""
    found = torch.where(alive[index], index, -1)
    here = torch.arange(len(index))
    stays = (found < 0) & ~alive
    found = torch.where(stays, here, found)
    left = torch.ones(len(index), dtype=torch.bool)
    left[found[found >= 0]] = False
    found[found < 0] = torch.nonzero(left)[:, 0]
    return found
