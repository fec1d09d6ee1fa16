"""What a server with clients of several widths remembers: who has which width, and the models at every width.

A client of unknown width is asked for it (`answer_width`). Where it does not answer, it is sent the model at the
model's own width, and the shapes of its first usable reply tell. A client whose reply could not be used is asked
again before the next round: it may have been started again with another width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import digest
from c2m3_fl.errors import SpecError
from c2m3_fl.flower.widths.sizes import Cuts, Sizes
from c2m3_fl.flower.wrapped import typed_like

PREFIX = "widths/"
_REFIT, _OF = "refit/", "refit-of"  # what follows the prefix where clients have refit restrictions
_KEPT = 2  # models whose restrictions are kept: the trajectory and the deployed model


class Resizing:
    """The widths of the nodes, and the models that they are sent.

    Parameters
    ----------
    sizes : Sizes
        All widths.
    limit : int
        Of how many nodes the width is remembered; of more, those that replied last.

    Attributes
    ----------
    places : mapping of int to int
        By node its width, as a place in `sizes.networks`.
    silent : set of int
        Nodes that were asked for their width in this process and did not say a known one.
    doubted : set of int
        Nodes that are asked again although their width is known.
    """

    def __init__(self, sizes: Sizes, limit: int) -> None:
        self.sizes, self._limit = sizes, limit
        self.places: OrderedDict[int, int] = OrderedDict()
        self.silent: set[int] = set()
        self.doubted: set[int] = set()
        self._cuts: OrderedDict[tuple[str, bool], Cuts] = OrderedDict()
        self._refit: dict[int, Params] = {}
        self._refit_of = ""

    def unknown(self, nodes: Iterable[int]) -> list[int]:
        """The nodes to ask for their width: not known and not asked in vain, or doubted."""
        settled = (self.places.keys() | self.silent) - self.doubted
        return [node for node in dict.fromkeys(nodes) if node not in settled]

    def note(self, places: Mapping[int, int], current: Collection[int] = ()) -> None:
        """Remember the widths of some nodes; beyond the limit the oldest are forgotten, but no current ones."""
        for node, place in places.items():
            self.places.pop(node, None)
            self.places[node] = place
        kept = {*places, *current}
        old = [node for node in self.places if node not in kept]
        for node in old[: max(0, len(self.places) - self._limit)]:
            del self.places[node]

    def answered(self, places: Mapping[int, int], asked: Collection[int], current: Collection[int]) -> list[int]:
        """Remember what nodes that were asked have said; of the others what was known stays.

        Parameters
        ----------
        places : mapping of int to int
            By node, the width that it said.
        asked : collection of int
            Who was asked.
        current : collection of int
            To whom a model is to be sent: see `note`.

        Returns
        -------
        list of int
            The nodes whose width is not known.
        """
        self.note(places, current)
        self.silent |= {*asked} - places.keys()
        self.silent -= places.keys()
        self.doubted -= {*asked}
        return [node for node in asked if node not in self.places]

    def replied(self, places: Mapping[int, int], failed: Collection[int]) -> None:
        """Remember the widths of usable replies, and ask nodes again that sent none.

        Parameters
        ----------
        places : mapping of int to int
            By node, the width that it replied with.
        failed : collection of int
            Nodes of whom some reply could not be used.
        """
        self.note(places)
        self.doubted |= {*failed} - places.keys()

    def cuts(self, params: Params, *, deployed: bool) -> Cuts:
        """A model at every width: the trajectory as it is, so that clients train its own units, or a deployed model.

        Parameters
        ----------
        params : mapping of str to Tensor
            The model.
        deployed : bool
            Whether its restrictions are recalibrated.
        """
        key = self._digest(params), deployed
        if key not in self._cuts:
            known = self._refit if deployed and key[0] == self._refit_of else None
            self._cuts[key] = Cuts(self.sizes, params, self.sizes.recalibration if deployed else None, known)
            while len(self._cuts) > _KEPT:
                self._cuts.popitem(last=False)
        return self._cuts[key]

    def refits_another(self, params: Params) -> bool:
        """Whether clients have refit restrictions, but not those of this model."""
        return bool(self._refit) and self._digest(params) != self._refit_of

    def _digest(self, params: Params) -> str:
        """Digest of a model in its own element types."""
        return digest(typed_like(self.sizes.networks[0].held.model.state_dict(), params))

    def keep(self, params: Params, found: Mapping[int, Params]) -> None:
        """Remember restrictions that clients have refit, in place of earlier ones of this model, and of other models.

        Parameters
        ----------
        params : mapping of str to Tensor
            The deployed model.
        found : mapping of int to Params
            Its restrictions, by width.
        """
        before, of = self._refit_of, self._digest(params)
        kept = {**(self._refit if of == before else {}), **found}
        self._refit, self._refit_of = kept, of if kept else ""
        for of in (before, self._refit_of):
            self._cuts.pop((of, True), None)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything remembered, as tensors whose names start with ``widths/``.

        Who has which width, oldest first: numbers of elements of its tensors, named ``widths/position/node``. What
        clients have refit: ``widths/refit/width/name``, and the digest of the model that it belongs to.
        """
        sizes = self._elements()
        state = {
            f"{position}/{node}": torch.tensor(sizes[place])
            for position, (node, place) in enumerate(self.places.items())
        }
        for place, params in self._refit.items():
            state |= {f"{_REFIT}{place}/{name}": value for name, value in params.items()}
        if self._refit:
            state[_OF] = torch.tensor(list(bytes.fromhex(self._refit_of)), dtype=torch.uint8)
        return {PREFIX + name: value for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Remember that instead; `SpecError` for widths that the strategy does not have."""
        nodes, known = [], {tuple(sizes): place for place, sizes in enumerate(self._elements())}
        refit: dict[str, dict[str, Tensor]] = {}
        of = ""
        for key, value in state.items():
            kind = key.removeprefix(PREFIX)
            if kind == _OF:
                of = bytes(value.tolist()).hex()
            elif kind.startswith(_REFIT):
                place, _, name = kind.removeprefix(_REFIT).partition("/")
                refit.setdefault(place, {})[name] = value
            else:
                position, _, node = kind.partition("/")
                found = known.get(tuple(value.reshape(-1).tolist()))
                if found is None:
                    raise self._unknown(f"node {node} is remembered", value.tolist())
                nodes.append((int(position), int(node), found))
        restrictions: dict[int, Params] = {self._place_of(params): params for params in refit.values()}
        self.places = OrderedDict((node, place) for _, node, place in sorted(nodes))
        self._refit, self._refit_of = restrictions, of
        self._cuts.clear()

    def _place_of(self, params: Params) -> int:
        place = self.sizes.place_of({name: tuple(value.shape) for name, value in params.items()})
        if place is None:
            raise self._unknown("a model is remembered", [value.numel() for value in params.values()])
        return place

    def _unknown(self, what: str, elements: Sequence[int]) -> SpecError:
        count = len(self.sizes.networks)
        expected = f"expected those of one of the {count} networks: other sizes"
        return SpecError(f"{what} with tensors of {elements} elements, {expected}")

    def _elements(self) -> list[list[int]]:
        """Of every width the number of elements of each tensor."""
        return [[value.numel() for value in each.held.model.state_dict().values()] for each in self.sizes.networks]
