"""What a match holds beside the nodes: one copy of each, and little else."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from c2m3_fl.core.match import match
from tests.core.networks import mlp, planted

NODES = 10


class Peak(TorchDispatchMode):
    """The largest number of bytes that tensors made inside held at one time."""

    def __init__(self, known):
        super().__init__()
        self._known = {value.untyped_storage().data_ptr() for value in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._live = {address: each for address, each in self._live.items() if not each[0].expired()}
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self._known:
                storage = value.untyped_storage()
                self._live[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.bytes = max(self.bytes, sum(size for _, size in self._live.values()))
        return out


def models_held(spec, nodes, **options):
    """Models per node that a match holds at most."""
    values = [value for node in nodes for value in node.values()]
    with Peak(values) as peak:
        match(spec, nodes, **options)
    return peak.bytes / sum(value.nbytes for value in values)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """As small beside the network as the usual ones are beside a large network."""
    for module in ("terms", "identity_proof"):
        monkeypatch.setattr(f"c2m3_fl.core.{module}._AT_A_TIME", 1 << 12)


@pytest.mark.parametrize("start", ["identity", "auto", "barycentre"])
def test_a_match_holds_at_most_one_and_a_half_models_a_node(start):
    spec = mlp(512, 96, 96, 10)
    nodes, _ = planted(spec, NODES, 1.0, seed=0, dtype=torch.float32)
    assert models_held(spec, nodes, start=start, max_steps=3) <= 1.5


def test_a_node_that_has_not_moved_costs_half_a_model():
    spec = mlp(512, 96, 96, 10)
    (node,), _ = planted(spec, 1, 0.0, seed=0, dtype=torch.float32)
    assert models_held(spec, [node] * NODES) <= 0.5
