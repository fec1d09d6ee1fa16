"""Branches on training mode and on the size of the batch are seen; precision inside does not matter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.core.spec_json import from_json, to_json
from c2m3_fl.errors import SpecError
from c2m3_fl.network.calibration import as_inputs
from c2m3_fl.symmetry.discover import permutation_spec, require_invariance
from c2m3_fl.symmetry.proof_settings import survey
from tests.symmetry.families import Lambda, noise


def branching(when: Callable[[nn.Module, Tensor], bool]) -> nn.Module:
    """Six hidden units, of which a branch scales each by its place."""

    def run(net: nn.Module, x: Tensor) -> Tensor:
        h = net.a(x).relu()
        return net.b(h * torch.arange(1.0, 7.0) if when(net, x) else h)

    return Lambda(run, a=nn.Linear(4, 6), b=nn.Linear(6, 2))


BRANCHES = {
    "training mode": lambda net, x: net.training,
    "a large batch": lambda net, x: x.shape[0] > 8,
    "training on a large batch": lambda net, x: net.training and x.shape[0] > 8,
    "a single example": lambda net, x: x.shape[0] == 1,
}


@pytest.mark.parametrize("when", BRANCHES.values(), ids=BRANCHES.keys())
def test_a_branch_that_tells_units_apart_is_seen(when: Callable[[nn.Module, Tensor], bool]) -> None:
    never = permutation_spec(branching(lambda net, x: False), noise(3, 4))
    assert list(never.groups) == ["a"]
    network = branching(when)
    assert not permutation_spec(network, noise(3, 4)).groups
    with pytest.raises(SpecError, match=r"groups \['a'\]"):
        require_invariance(network, never, noise(3, 4))


def test_one_program_for_all_modes_and_sizes_is_traced_once_and_said() -> None:
    norm, drop = nn.BatchNorm1d(6), nn.Dropout(0.5)
    network = nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), drop, nn.Linear(6, 2))
    spec = permutation_spec(network, noise(3, 4))
    modes = ("evaluation mode", "training mode")
    large = tuple(f"{mode}, a batch of 34" for mode in modes)
    assert spec.proven == (*modes, "evaluation mode, a batch of 1", *large)  # BatchNorm does not train on one example
    assert from_json(to_json(spec)).proven == spec.proven
    assert len(survey(network, as_inputs(noise(3, 4))).distinct) == 1


def test_a_mode_that_cannot_run_is_not_among_the_proven() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    spec = permutation_spec(network, noise(1, 4))  # batch statistics of one example do not exist
    assert spec.proven == ("evaluation mode", *(f"{mode} mode, a batch of 34" for mode in ("evaluation", "training")))


# -------------------------------------------------------------------------------------------------------- precision


class Llama(nn.Module):
    """A block whose normalisation runs in one type and whose attention in another."""

    def __init__(self, norm: torch.dtype, attention: torch.dtype) -> None:
        super().__init__()
        self.types = norm, attention
        self.embed, self.scale = nn.Linear(3, 8), nn.Parameter(torch.ones(8))
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.up, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 2)

    def norm(self, x: Tensor) -> Tensor:
        wide = x.to(self.types[0])
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.scale * wide.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        h = self.norm(x)
        q, k, v = (part(h).unflatten(-1, (2, 4)).transpose(1, 2).to(self.types[1]) for part in (self.q, self.k, self.v))
        scores = (q @ k.mT).float().softmax(-1).to(self.types[1])
        x = x + self.o((scores @ v).transpose(1, 2).flatten(2).to(x.dtype))
        h = self.norm(x)
        x = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return self.head(self.norm(x).mean(1))


@pytest.mark.parametrize("attention", [torch.float32, torch.float16])
def test_types_inside_cost_no_group(attention: torch.dtype) -> None:
    found = []
    for seed, norm in ((0, torch.float32), (1, torch.bfloat16)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found.append(permutation_spec(Llama(norm, attention), noise(2, 5, 3)))
    sizes = {name: group.size for name, group in found[0].groups.items()}
    assert sizes == {"embed": 8, "q.blocks": 2, "q": 8, "v": 8, "up": 12}
    assert found[0].groups == found[1].groups


def test_weights_rounded_row_by_row_cost_no_group() -> None:
    """Scaled by 127 they are large; in a smaller size, all of them would be rounded to zero."""

    def run(net: nn.Module, x: Tensor) -> Tensor:
        size = net.a.weight.abs().amax(1, keepdim=True)
        h = nn.functional.linear(x, (net.a.weight / size * 127).round() / 127 * size).relu()
        return net.b(h.type_as(x))

    network = Lambda(run, a=nn.Linear(3, 8, bias=False), b=nn.Linear(8, 2))
    assert {group.size for group in permutation_spec(network, noise(2, 3)).groups.values()} == {8}


def test_rounding_to_eight_bits_costs_no_group() -> None:
    def run(net: nn.Module, x: Tensor) -> Tensor:
        h = net.a(x).relu().to(torch.float8_e4m3fn).float()
        return net.b((h * 4).round().div(4).to(x.dtype))

    network = Lambda(run, a=nn.Linear(3, 8), b=nn.Linear(8, 2))
    assert {group.size for group in permutation_spec(network, noise(2, 3)).groups.values()} == {8}
