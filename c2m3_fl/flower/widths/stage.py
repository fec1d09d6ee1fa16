"""What a server with clients of several widths remembers: who has which width, and the models at every width.

A client of unknown width is asked for it (`answer_width`). Where it does not answer, it is sent the model at the
model's own width, and the shapes of its first reply tell.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import digest
from c2m3_fl.errors import SpecError
from c2m3_fl.flower.widths.sizes import Cuts, Sizes

PREFIX = "widths/"
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
    """

    def __init__(self, sizes: Sizes, limit: int) -> None:
        self.sizes, self._limit = sizes, limit
        self.places: OrderedDict[int, int] = OrderedDict()
        self._cuts: OrderedDict[tuple[str, bool], Cuts] = OrderedDict()

    def unknown(self, nodes: Iterable[int]) -> list[int]:
        """The nodes whose width is not known."""
        return [node for node in dict.fromkeys(nodes) if node not in self.places]

    def note(self, places: Mapping[int, int]) -> None:
        """Remember the widths of some nodes."""
        for node, place in places.items():
            self.places.pop(node, None)
            self.places[node] = place
        while len(self.places) > max(self._limit, len(places)):
            self.places.popitem(last=False)

    def cuts(self, params: Params, *, deployed: bool) -> Cuts:
        """A model at every width: the trajectory as it is, so that clients train its own units, or a deployed model.

        Parameters
        ----------
        params : mapping of str to Tensor
            The model.
        deployed : bool
            Whether its restrictions are recalibrated.
        """
        key = digest(params), deployed
        if key not in self._cuts:
            self._cuts[key] = Cuts(self.sizes, params, self.sizes.recalibration if deployed else None)
            while len(self._cuts) > _KEPT:
                self._cuts.popitem(last=False)
        return self._cuts[key]

    def state_dict(self) -> dict[str, Tensor]:
        """Who has which width, oldest first, as tensors named ``widths/position/node``."""
        return {
            f"{PREFIX}{position}/{node}": torch.tensor(place)
            for position, (node, place) in enumerate(self.places.items())
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Remember that instead; `SpecError` for widths that the strategy does not have."""
        found = []
        for key, value in state.items():
            position, _, node = key.removeprefix(PREFIX).partition("/")
            if not 0 <= int(value) < len(self.sizes.networks):
                count = len(self.sizes.networks)
                raise SpecError(f"remembered width {int(value)} of node {node}, expected one of {count}: other sizes")
            found.append((int(position), int(node), int(value)))
        self.places = OrderedDict((node, place) for _, node, place in sorted(found))
