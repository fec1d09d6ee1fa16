"""What every network of a table must satisfy: its groups are the expected ones, exact by the rules alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.utils import _pytree as pytree

from c2m3_fl.core.permutation import apply, random
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.network.calibration import as_inputs
from c2m3_fl.symmetry.discover import derive
from c2m3_fl.symmetry.proof import Prover
from tests.symmetry.families import Inputs


def check(build: Callable[[], nn.Module], inputs: Inputs, *sizes: int, rounding: float = 1e-9) -> PermutationSpec:
    """Derive, prove and permute a network; `sizes` are those of its groups, in the order of the state dict."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build().eval()
    call = as_inputs(inputs)
    spec, modes, *_ = derive(network, call)
    assert tuple(group.size for group in spec.groups.values()) == sizes, spec
    if spec.groups:
        provers = [Prover(network, call, training=training) for training in modes]
        assert max(prover.error(spec) for prover in provers for _ in range(3)) < rounding
    args, kwargs = call
    with torch.no_grad():
        before = copy.deepcopy(network(*args, **kwargs))
        moved = apply(spec, random(spec, torch.Generator().manual_seed(3)), copy.deepcopy(network.state_dict()))
        network.load_state_dict(moved)
        after = network(*args, **kwargs)
    for one, other in zip(pytree.tree_leaves(after), pytree.tree_leaves(before), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    return spec


def reasons(spec: PermutationSpec, tensor: str) -> set[str]:
    """Why axes of a tensor are pinned."""
    return {pin.reason for pin in spec.pins if pin.tensor == tensor}
