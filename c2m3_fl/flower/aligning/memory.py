"""What a server remembers of its nodes between rounds: the permutation that each was last found in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.errors import ConfigError, SpecError

Noted = Mapping[int, dict[str, Tensor]]


class Memory:
    """The last map of every node into the basis of the global model, of bounded size.

    Only nodes that were found out of the global basis take room. When more than `limit` of them are known, the
    one that was not heard of for longest is forgotten: it will be matched from the identity again.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    limit : int
        Largest number of nodes remembered.
    """

    def __init__(self, spec: PermutationSpec, limit: int = 1000) -> None:
        if limit < 0:
            raise ConfigError(f"memory is {limit}, expected the number of nodes to remember, zero or more")
        self.spec = spec
        self.limit = limit
        self._maps: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._maps)

    def recall(self, node: int) -> dict[str, Tensor] | None:
        """The node's last map into the global basis; None when it was in it or was never seen."""
        stored = self._maps.get(node)
        return None if stored is None else {name: _wide(index) for name, index in stored.items()}

    def remember(self, node: int, perm: Permutation) -> None:
        """Note where a node was found."""
        self._maps.pop(node, None)
        if self.limit == 0 or permutation.is_identity(perm):
            return
        self._maps[node] = {
            name: (index if index.is_floating_point() else index.to(torch.int32)).cpu() for name, index in perm.items()
        }
        if len(self._maps) > self.limit:
            self._maps.popitem(last=False)

    def noted(self) -> Noted:
        """What is remembered now, for `take_back`."""
        return self._maps.copy()

    def take_back(self, nodes: Iterable[int], noted: Noted) -> None:
        """Remember of some nodes what was noted earlier: after a round in which their replies were not used."""
        for node in nodes:
            self._maps.pop(node, None)
            if node in noted:
                self._maps[node] = noted[node]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything remembered, oldest first, as tensors named ``position/node/group``."""
        return {
            f"{position}/{node}/{name}": index
            for position, (node, perm) in enumerate(self._maps.items())
            for name, index in perm.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace everything remembered; raise `SpecError` for what does not fit the network."""
        found: dict[tuple[int, int], dict[str, Tensor]] = {}
        for key, index in state.items():
            try:
                position, who, name = key.split("/", 2)
                found.setdefault((int(position), int(who)), {})[name] = index
            except ValueError as error:
                raise SpecError(f"remembered permutation {key!r} is not named position/node/group") from error
        self._maps.clear()
        for (_, node), perm in sorted(found.items()):
            permutation.validate(self.spec, perm, f"remembered permutation of node {node}")
            self.remember(node, perm)


def _wide(index: Tensor) -> Tensor:
    return index if index.is_floating_point() else index.long()
