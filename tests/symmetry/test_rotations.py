"""Groups that linear operators alone read are rotated: each of the kind that a reader expects, and exact."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from c2m3_fl import Group, PermutationSpec, check_invariance, permutation_spec
from c2m3_fl.core.permutation import apply, random
from c2m3_fl.core.spec_json import from_json, to_json
from c2m3_fl.errors import SpecError
from c2m3_fl.symmetry import find_folding, linear_uses, require_invariance
from tests.symmetry.families import TEXT, Lambda, gpt, noise
from tests.symmetry.streams import STREAMS, made
from tests.symmetry.transformers import Attention, PackedGroupedAttention

# The groups in the order of the state dict: P permutes, O rotates, C rotates and keeps the vector of ones.
# Stream; heads, queries with keys, values with outputs, hidden layer of each block.
EXPECTED = {
    "pre-norm": "C POOP POOP",
    "vit": "C POOP POOP",
    "gpt": "C POOP",
    "gpt-tied": "P POOP",  # the table of tokens is the head, and cannot take the last norm's scale
    "gpt-without-biases": "C POOP",
    "bert": "P POOP POOP P",  # the norms' outputs are the stream; the pooler has a tanh
    "llama": "O POP",  # rotary positions order the entries of queries and keys
    "encoder-decoder": "CPOOPPOOPOOP",  # one stream: one weight reads queries from the one, keys from the other
    "spelled-out": "C",
    "twice": "C",
    "channels-last": "C",
    "channels-last-padded": "C",
}


@cache
def spec_of(name: str) -> PermutationSpec:
    return permutation_spec(made(name), STREAMS[name][1], rotations=True)


def kinds(spec: PermutationSpec) -> str:
    return "".join(group.kind[0].upper() for group in spec.groups.values())


@pytest.mark.parametrize("name", STREAMS)
def test_groups_are_of_the_expected_kinds(name: str) -> None:
    assert kinds(spec_of(name)) == EXPECTED[name].replace(" ", "")


@pytest.mark.parametrize("name", STREAMS)
def test_a_folded_and_rotated_network_computes_the_same(name: str) -> None:
    network, inputs, spec = made(name).double(), STREAMS[name][1], spec_of(name)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    own = dict(network.state_dict())
    folded = find_folding(network, inputs).fold(own)
    turned = apply(spec, random(spec, torch.Generator().manual_seed(3)), folded)
    with torch.no_grad():
        expected = functional_call(network, own, (inputs,), tie_weights=False)
        torch.testing.assert_close(functional_call(network, turned, (inputs,), tie_weights=False), expected)
    for value, other in ((own, folded), (folded, turned)):
        assert any(not torch.equal(value[key], other[key]) for key in own)


@pytest.mark.parametrize("name", ["pre-norm", "llama"])
def test_permutations_alone_are_found_unless_rotations_are_asked_for(name: str) -> None:
    plain = permutation_spec(made(name), STREAMS[name][1])
    assert not plain.rotations
    assert plain.groups.keys() == spec_of(name).groups.keys()
    assert "kind" not in str(plain)


def test_the_kind_is_shown_and_kept_in_json() -> None:
    spec = spec_of("pre-norm")
    assert "12  centred " in str(spec)
    assert "one after its norm is folded" in {pin.reason for pin in spec.pins}
    assert from_json(to_json(spec)) == spec


class Middle(nn.Module):
    """Two linear layers, and what happens to eight units between them."""

    def __init__(self, between: Callable[..., Tensor]):
        super().__init__()
        self.inward, self.outward, self.between = nn.Linear(5, 8), nn.Linear(8, 3), between
        if "gain" in between.__code__.co_names:
            self.gain = nn.Parameter(torch.rand(8) + 0.5)
        if "table" in between.__code__.co_names:
            self.table = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.outward(self.between(self, self.inward(x)))


# What happens to the units, and the kind of their group.
BETWEEN: dict[str, tuple[Callable[[Middle, Tensor], Tensor], str]] = {
    "nothing": (lambda net, x: x, "O"),
    "dropout, a number times them": (lambda net, x: -2.5 * functional.dropout(x, 0.5, net.training), "O"),
    "a mean over rows": (lambda net, x: x - x.mean(0), "O"),
    "a length": (lambda net, x: x / x.norm(dim=-1, keepdim=True), "O"),
    "a length, spelled out": (lambda net, x: x * torch.rsqrt((x * x).sum(-1, keepdim=True)), "O"),
    "a length of their own dot products": (lambda net, x: torch.softmax(x @ x.T, -1) @ x, "O"),
    "a length that torch spreads out": (lambda net, x: functional.normalize(x, dim=-1), "O"),
    "products of batches": (lambda net, x: torch.baddbmm(torch.zeros(1, 4, 4), x[None], x.T[None])[0] @ x, "O"),
    "rows chosen": (lambda net, x: torch.where(x.detach().norm(dim=-1, keepdim=True) > 2, x, 0.0), "O"),
    "rows of ones chosen": (lambda net, x: torch.where(torch.arange(4)[:, None] > 1, x, 1.0), "P"),
    "units chosen": (lambda net, x: torch.where(x > 0, x, 0.0), "P"),
    "a number less the units": (lambda net, x: 1.0 - x, "C"),
    "a quadratic form": (lambda net, x: torch.einsum("bi,ij,bj->b", x, net.table, x)[:, None] * x, "O"),
    "the layer's own weight back": (lambda net, x: x @ net.table @ net.table.T, "OO"),
    "a cast": (lambda net, x: x.double().to(x.dtype), "O"),
    "a number per row": (lambda net, x: x * x.detach().norm(dim=-1, keepdim=True).tanh(), "O"),
    "one row left out, one of zeros": (lambda net, x: functional.pad(x[1:], (0, 0, 0, 1)), "O"),
    "a row of ones": (lambda net, x: functional.pad(x, (0, 0, 0, 1), value=1.0), "P"),
    "a mean over units": (lambda net, x: x - x.mean(-1, keepdim=True), "C"),
    "one number for all units": (lambda net, x: x + 1.5, "C"),
    "a spread": (lambda net, x: x * x.var(-1, keepdim=True), "C"),
    "rectified": (lambda net, x: x.relu(), "P"),
    "rectified where nothing is negative": (lambda net, x: (x + 1000).relu(), "P"),
    "clamped where nothing is": (lambda net, x: x.clamp(-1e6, 1e6), "P"),
    "squares": (lambda net, x: x * x, "P"),
    "fourth powers": (lambda net, x: x * x.pow(4).mean(-1, keepdim=True), "P"),
    "sums of absolute values": (lambda net, x: x * x.norm(p=1, dim=-1, keepdim=True), "P"),
    "a gain": (lambda net, x: x * net.gain, "P"),
    "a gain in a norm that the residual reads": (lambda net, x: functional.layer_norm(x, (8,), net.gain) + x, "P"),
    "batch statistics": (lambda net, x: functional.batch_norm(x, torch.zeros(8), torch.ones(8), training=True), "P"),
    "the largest unit": (lambda net, x: x * x.amax(-1, keepdim=True), "P"),
    "a coordinate per row": (lambda net, x: x * x.mean(0), "P"),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_an_axis_rotates_if_all_that_meets_it_is_linear_or_a_length(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Middle(BETWEEN[name][0]).eval()
    spec = permutation_spec(network, noise(4, 5), rotations=True)
    assert kinds(spec) == BETWEEN[name][1], f"{spec}"
    assert check_invariance(network, spec, noise(4, 5)) < 1e-9


def test_the_inside_of_adapters_rotates() -> None:
    network = Lambda(
        lambda net, x: net.outward((net.base(x) + net.up(net.down(x))).relu()),
        base=nn.Linear(5, 7), down=nn.Linear(5, 3, bias=False), up=nn.Linear(3, 7, bias=False), outward=nn.Linear(7, 2),
    )  # fmt: skip
    spec = permutation_spec(network, noise(4, 5), rotations=True)
    assert {name: group.kind for name, group in spec.groups.items()} == {"base": "permutation", "down": "orthogonal"}


@pytest.mark.parametrize(
    "attention", [partial(Attention, 24, 6, key_heads=2), partial(PackedGroupedAttention, 24, 6, 2)]
)
def test_queries_that_share_a_key_permute_and_rotate_inside_as_their_key_does(
    attention: Callable[[], nn.Module],
) -> None:
    network = gpt(attention, width=24, tied=False).eval()
    spec = permutation_spec(network, TEXT, rotations=True)
    assert sorted(kinds(spec)) == sorted("CPPOOP")
    assert check_invariance(network, spec, TEXT) < 1e-9


def test_the_proof_finds_what_no_rule_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear_uses._RULES, "aten.relu", linear_uses._carry)
    network = Middle(BETWEEN["rectified"][0]).eval()
    assert kinds(permutation_spec(network, noise(4, 5), rotations=True)) == "P"


def test_a_group_whose_rotation_would_show_nothing_permutes() -> None:
    network = Middle(lambda net, x: x * 0.0).eval()
    assert "O" not in kinds(permutation_spec(network, noise(4, 5), rotations=True))


def test_a_wrong_kind_is_refused_by_name_and_a_right_one_reports_its_power() -> None:
    network = Middle(BETWEEN["a mean over units"][0]).eval()
    spec = permutation_spec(network, noise(4, 5), rotations=True)
    found = check_invariance(network, spec, noise(4, 5))
    assert found < 1e-9
    assert found.power["inward"] > 1e-3
    require_invariance(network, spec, noise(4, 5))
    wrong = PermutationSpec({"inward": Group(8, kind="orthogonal")}, spec.tensors)
    assert check_invariance(network, wrong, noise(4, 5)) > 1e-3
    with pytest.raises(SpecError, match=r"groups \['inward'\] change the outputs"):
        require_invariance(network, wrong, noise(4, 5))


def test_the_inside_of_heads_rotates_in_networks_that_hardly_depend_on_it() -> None:
    network = made("gpt")
    for value in network.parameters():
        if value.ndim > 1:
            value.data *= 0.02  # the standard deviation of initial weights in libraries
    assert kinds(permutation_spec(network, TEXT, rotations=True)) == "CPOOP"
