"""Who has which unit: the maps of a merge of different widths."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.widths.injections import Injection, between


@dataclass(frozen=True, eq=False)
class WidthMaps:
    """Each node's injection into the widest network, in the basis of the merge.

    Attributes
    ----------
    specs : tuple of PermutationSpec
        The symmetries of each node.
    into : tuple of mapping of str to Tensor of int64
        For every group and place of the widest network the node's unit that sits there, or -1. Units all of whose
        parameters are zero sit nowhere.
    """

    specs: tuple[PermutationSpec, ...]
    into: tuple[Injection, ...]

    def between(self, to: int, source: int) -> dict[str, Tensor]:
        """The map from node `source` to node `to`: for every unit of `to` the unit of `source`, or -1 for none.

        The map from C to B and then to A is contained in the map from C to A; they are equal where B has the unit.

        Raises
        ------
        ConfigError
            When there is no node of that number.
        """
        count = len(self.into)
        if not (0 <= to < count and 0 <= source < count):
            raise ConfigError(f"between({to}, {source}): the {count} nodes have the numbers 0 to {count - 1}")
        sizes = {name: group.size for name, group in self.specs[to].groups.items()}
        return between(self.into[to], self.into[source], sizes)

    @property
    def shares(self) -> tuple[float, ...]:
        """Per node the share of the widest network's units that it has; 1 for a spec without groups."""
        return tuple(
            sum(int((units >= 0).sum()) for units in own.values()) / max(1, sum(len(units) for units in own.values()))
            if own
            else 1.0
            for own in self.into
        )
