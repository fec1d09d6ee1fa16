"""Scales of norms go into what reads them: the same function, and no norm is folded whose readers cannot take it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from c2m3_fl import fold, unfold
from c2m3_fl.errors import ParamsError
from c2m3_fl.symmetry.folding import Folding, find_folding
from tests.symmetry.streams import STREAMS, made

# Scales that are folded, axes that write to each stream that is centred, and scales that are kept, each with a reason.
EXPECTED: dict[str, tuple[int, list[int], dict[str, str]]] = {
    "pre-norm": (5, [11], {}),
    "vit": (5, [12], {}),
    "gpt": (3, [6], {}),
    "gpt-tied": (2, [], {"norm.weight": "aten.embedding in 'tokens' uses 'head.weight' as well"}),
    "gpt-without-biases": (3, [6], {}),
    "bert": (1, [2], {"layers.layers.0.norm1.weight": "no parameter of aten.add.Tensor in 'layers.layers.0'"}),
    "llama": (3, [], {}),
    "encoder-decoder": (7, [6, 8], {}),
    "spelled-out": (2, [], {}),
    "twice": (1, [], {}),
    "channels-last": (1, [2], {}),
    "channels-last-padded": (1, [2], {}),
}


@cache
def folding(name: str) -> Folding:
    return find_folding(made(name), STREAMS[name][1])


def output(network: nn.Module, params: dict[str, Tensor], inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return functional_call(network, params, (inputs,), tie_weights=False)


@pytest.mark.parametrize("name", STREAMS)
def test_norms_and_streams_are_found_and_the_others_are_named(name: str) -> None:
    found = folding(name)
    count, streams, kept = EXPECTED[name]
    assert (len(found.norms), [len(stream) for stream in found.streams]) == (count, streams)
    assert all(words in found.kept[key] for key, words in kept.items())
    assert bool(found.kept) == bool(kept)


@pytest.mark.parametrize("name", STREAMS)
def test_a_folded_network_and_its_inverse_compute_the_same(name: str) -> None:
    network, inputs, found = made(name), STREAMS[name][1], folding(name)
    own = dict(network.state_dict())
    folded = found.fold(own)
    back = found.unfold(folded, like=made(name, seed=1).state_dict())
    expected = output(network, own, inputs)
    for other in (folded, back):
        network.load_state_dict(other)  # loads: the architecture is its own
        torch.testing.assert_close(
            output(network, other, inputs), expected, rtol=0, atol=1e-6 * float(expected.abs().max())
        )


@pytest.mark.parametrize("name", STREAMS)
def test_folded_scales_are_one_and_unfolding_gives_those_of_the_other(name: str) -> None:
    found = folding(name)
    own, other = made(name).state_dict(), made(name, seed=1).state_dict()
    folded = found.fold(own)
    back = found.unfold(folded, like=other)
    for norm in found.norms:
        assert bool((folded[norm.scale] == 1).all())
        assert torch.equal(back[norm.scale], other[norm.scale])
        if norm.folds_shift:
            assert not folded[norm.shift].any()
            assert torch.equal(back[norm.shift], other[norm.shift])
    for tensor, axis in (place for stream in found.streams for place in stream):
        assert float(folded[tensor].mean(axis).abs().max()) < 1e-6


def test_unfolding_with_its_own_scales_gives_the_network_back_where_nothing_is_centred() -> None:
    own = made("llama").state_dict()
    back = folding("llama").unfold(folding("llama").fold(own), like=own)
    for name, value in own.items():
        torch.testing.assert_close(back[name], value, rtol=1e-6, atol=1e-7)


def test_a_shift_stays_divided_by_its_scale_where_a_reader_has_no_bias() -> None:
    own = made("gpt-without-biases").state_dict()
    folded = folding("gpt-without-biases").fold(own)
    scale, shift = own["blocks.0.n1.weight"], own["blocks.0.n1.bias"]
    torch.testing.assert_close(folded["blocks.0.n1.bias"], shift / scale)
    assert not folded["blocks.0.n2.bias"].any(), "the hidden layer has a bias"


def test_a_scale_of_zero_by_which_something_must_be_divided_is_refused_by_name() -> None:
    own = {name: value.clone() for name, value in made("gpt-without-biases").state_dict().items()}
    own["blocks.0.n1.weight"][3] = 0.0
    with pytest.raises(ParamsError, match=r"'blocks.0.n1.weight' is zero in 1 of its 12 entries"):
        folding("gpt-without-biases").fold(own)
    with pytest.raises(ParamsError, match=r"'blocks.0.n1.weight' is zero in 1 of its 12 entries"):
        folding("gpt-without-biases").unfold(made("gpt-without-biases").state_dict(), like=own)


class Read(nn.Module):
    """A norm whose output something other than a linear operator reads."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.inward, self.norm, self.outward = how, nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.norm(self.inward(x))
        if self.how == "output":
            return self.outward(x), x
        read = {
            "relu": lambda: x.relu(),
            "clamped far away": lambda: x.clamp(-100, 100),
            "largest over rows": lambda: x.amax(0),
            "sum over rows": lambda: x.sum(0),
            "by rows": lambda: x.sort(dim=0).values,
            "with itself": lambda: x @ (x.T @ x),
        }
        return self.outward(read[self.how]())


@pytest.mark.parametrize(
    "how", ["output", "relu", "clamped far away", "largest over rows", "sum over rows", "by rows", "with itself"]
)
def test_what_is_not_read_by_a_linear_operator_keeps_its_scale(how: str) -> None:
    found = find_folding(Read(how), torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))
    assert not found.norms
    assert list(found.kept) == ["norm.weight"]
    assert "norm.weight is kept" in str(found)


class Parts(nn.Module):
    """A weight in two parts: one reads a norm, the other, or the same once more, reads the inputs."""

    def __init__(self, second: slice):
        super().__init__()
        self.norm, self.second = nn.LayerNorm(6), second
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(self.norm(x), self.weight[:3], self.bias[:3])
        return torch.cat([y, nn.functional.linear(x, self.weight[self.second], self.bias[self.second])], -1)


def test_a_part_of_a_weight_takes_the_scale_unless_something_else_reads_it() -> None:
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    network = Parts(slice(3, 8))
    own = {name: value + 0.5 if name.startswith("norm") else value for name, value in network.state_dict().items()}
    folded = fold(network, own, inputs)
    assert torch.equal(folded["weight"][3:], own["weight"][3:])
    assert bool((folded["norm.weight"] == 1).all())
    torch.testing.assert_close(output(network, folded, inputs), output(network, own, inputs))
    torch.testing.assert_close(
        output(network, unfold(network, folded, inputs, like=own), inputs), output(network, own, inputs)
    )
    for overlapping in (slice(2, 8), slice(0, 8)):
        found = find_folding(Parts(overlapping), inputs)
        assert not found.norms
        assert "uses 'weight' as well" in found.kept["norm.weight"]


def test_the_public_functions_trace_and_fold() -> None:
    network, inputs = made("spelled-out"), STREAMS["spelled-out"][1]
    own = dict(network.state_dict())
    folded = fold(network, own, inputs)
    assert bool((folded["scale"] == 1).all())
    assert torch.equal(unfold(network, folded, inputs, like=own)["scale"], own["scale"])


def test_params_of_another_network_are_refused_by_name() -> None:
    network, inputs = made("spelled-out"), STREAMS["spelled-out"][1]
    own = dict(network.state_dict())
    less = {name: value for name, value in own.items() if name != "scale"}
    with pytest.raises(ParamsError, match=r"params: 'scale' is missing, expected shape \(8,\)"):
        fold(network, less, inputs)
    with pytest.raises(ParamsError, match=r"params: 'scale' has shape \(5,\), expected shape \(8,\)"):
        fold(network, {**own, "scale": torch.ones(5)}, inputs)
    with pytest.raises(ParamsError, match="like: 'scale' is missing"):
        unfold(network, own, inputs, like=less)
