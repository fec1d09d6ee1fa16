"""The sum of nodes in the universe, one node at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.spec import Params, PermutationSpec


class RunningUniverse:
    """Weighted sum of nodes that have been matched, accumulated in float64.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    """

    def __init__(self, spec: PermutationSpec) -> None:
        self._spec, self.weight = spec, 0.0
        self._sums: dict[str, Tensor] = {}

    def add(self, node: Params, perm: Permutation, weight: float) -> None:
        """Add a node; a negative weight takes it out again."""
        self.weight += weight
        for name, value in permutation.apply(self._spec, perm, node).items():
            if torch.is_floating_point(value):
                if name not in self._sums:
                    self._sums[name] = torch.zeros_like(value, dtype=torch.float64)
                self._sums[name].add_(value.to(self._sums[name].device), alpha=weight)

    def mean(self, like: Params) -> dict[str, Tensor]:
        """The mean, in the dtypes of `like`, from which it takes what cannot be averaged."""
        return {
            name: (self._sums[name] / self.weight).to(value.dtype) if name in self._sums else value
            for name, value in like.items()
        }

    def agreement(self, nodes: Sequence[Params], weights: Sequence[float]) -> float:
        """Weighted agreement of all pairs of the nodes that have been added, which are these."""
        names = [name for name in self._sums if not self._spec.tensors[name].buffer]
        own = sum(
            weight**2 * float(node[name].double().square().sum())
            for node, weight in zip(nodes, weights, strict=True)
            for name in names
        )
        return 0.5 * (sum(float(self._sums[name].square().sum()) for name in names) - own)
