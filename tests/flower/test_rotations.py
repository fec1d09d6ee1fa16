"""A strategy whose spec rotates: replies are folded, rotated into one basis, averaged, and sent out as usual."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from flwr.server import strategy as of_old
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    QFedAvg,
)
from torch import Tensor, nn
from torch.func import functional_call

from c2m3_fl import fold, permutation_spec
from c2m3_fl.core import permutation
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.errors import ConfigError, SpecError
from c2m3_fl.flower import LegacyC2M3
from c2m3_fl.flower.aligning.aligner import Basis
from c2m3_fl.flower.exchanged import restrict
from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import reply, send

EXAMPLE = torch.zeros(2, 5, 6)


class Stream(nn.Module):
    """A stream that two linear layers write to, read through one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.more = nn.Linear(6, 8), nn.Linear(6, 8)
        self.norm, self.hidden, self.out = nn.LayerNorm(8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores of inputs of shape (batch, steps, 6)."""
        stream = self.norm(self.into(inputs) + self.more(inputs.flip(-1)))
        return torch.as_tensor(self.out(torch.relu(self.hidden(stream))))


@cache
def known() -> tuple[Stream, PermutationSpec, dict[str, Tensor]]:
    """The model, its symmetries with a rotation, and params whose norm has scales and shifts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Stream().eval()
        with torch.no_grad():
            model.norm.weight.uniform_(0.5, 2.0)
            model.norm.bias.normal_()
    spec = permutation_spec(model, EXAMPLE, rotations=True)
    return model, spec, {name: value.clone() for name, value in model.state_dict().items()}


def strategy(basis: Basis) -> C2M3:
    model, spec, _ = known()
    return C2M3(FedAvg(fraction_evaluate=0.0), model=model, example_inputs=EXAMPLE, spec=spec, basis=basis)


def outputs(params: Params) -> Tensor:
    inputs = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(3))
    return torch.as_tensor(functional_call(known()[0], dict(params), (inputs,)))


def rotated(seed: int) -> dict[str, Tensor]:
    """The same function in a basis of its own."""
    model, spec, params = known()
    turn = permutation.random(spec, torch.Generator().manual_seed(seed))
    return permutation.apply(spec, turn, fold(model, params, EXAMPLE))


def test_the_spec_rotates() -> None:
    assert known()[1].rotations
    assert (rotated(1)["into.weight"] - rotated(2)["into.weight"]).abs().max() > 0.1
    torch.testing.assert_close(outputs(rotated(1)), outputs(known()[2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("basis", ["global", "client", "largest"])
def test_rotated_clients_are_averaged_to_the_network_that_they_are(basis: Basis) -> None:
    params, server = known()[2], strategy(basis)
    send(server, params)
    replies = {node: rotated(node) for node in (1, 2, 3)}
    arrays, _ = server.aggregate_train(1, [reply(node, each) for node, each in replies.items()])
    assert arrays is not None
    merged = to_params(arrays)
    torch.testing.assert_close(outputs(merged), outputs(params), rtol=1e-3, atol=1e-3)
    plain = {name: torch.stack([each[name] for each in replies.values()]).mean(0) for name in params}
    assert float((outputs(plain) - outputs(params)).abs().max()) > 0.1
    for node, own in replies.items():  # in the next round
        there = server.setup.aligner.own_basis(node, merged) if basis == "client" else merged
        torch.testing.assert_close(outputs(there), outputs(params), rtol=1e-3, atol=1e-3)
        if basis == "client":
            torch.testing.assert_close(there["into.weight"], own["into.weight"], rtol=1e-2, atol=1e-2)


def test_replies_that_nothing_moves_are_averaged_as_they_are() -> None:
    params, server = known()[2], strategy("global")
    send(server, params)
    arrays, _ = server.aggregate_train(1, [reply(node, params) for node in (1, 2)])
    assert arrays is not None
    assert all(torch.equal(value, params[name]) for name, value in to_params(arrays).items())


def test_a_part_of_the_state_dict_is_refused() -> None:
    spec = known()[1]
    with pytest.raises(SpecError, match=r"exchange of a part of the state dict: group .* is centred"):
        restrict(spec, list(spec.tensors)[:2])
    assert restrict(spec, spec.tensors) == spec


@pytest.mark.parametrize(
    ("wrapper", "inside"),
    [
        (C2M3, FedAdam),
        (C2M3, FedAvgM),
        (C2M3, partial(QFedAvg, client_learning_rate=0.1)),
        (LegacyC2M3, of_old.FedAvgM),
        (LegacyC2M3, of_old.QFedAvg),
    ],
    ids=["FedAdam", "FedAvgM", "QFedAvg", "legacy FedAvgM", "legacy QFedAvg"],
)
def test_strategies_that_step_from_what_was_sent_are_refused(wrapper, inside) -> None:
    model, spec, _ = known()
    strategy = inside()
    with pytest.raises(ConfigError, match=f"strategy is a {type(strategy).__name__}.*leave out rotations=True"):
        wrapper(strategy, model=model, example_inputs=EXAMPLE, spec=spec)


@pytest.mark.parametrize(
    "private",
    [DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyClientSideFixedClipping],
    ids=["server", "clients"],
)
def test_differential_privacy_is_refused_in_either_order(private) -> None:
    model, _, params = known()
    options = {"model": model, "example_inputs": EXAMPLE, "alignment": "separate", "head": None, "judge": None}
    bound = {"noise_multiplier": 1.0, "clipping_norm": 1.0, "num_sampled_clients": 2}
    with pytest.raises(ConfigError, match=f"{private.__name__} bounds how far .* leave out rotations=True"):
        C2M3(private(FedAvg(), **bound), rotations=True, **options)
    outside = private(C2M3(FedAvg(), rotations=True, **options), **bound)
    with pytest.raises(ConfigError, match=f"{private.__name__} bounds how far .* leave out rotations=True"):
        send(outside, params)


class Biasless(Stream):
    """The reader of the norm has no bias: the norm keeps its shift, divided by its scale."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 7, bias=False)


@pytest.mark.parametrize("wrapper", [C2M3, LegacyC2M3])
def test_rotations_are_derived_where_they_are_asked_for(wrapper) -> None:
    model, spec, _ = known()
    assert wrapper(model=model, example_inputs=EXAMPLE, rotations=True).setup.spec == spec
    assert not wrapper(model=model, example_inputs=EXAMPLE).setup.spec.rotations
    permuting = permutation_spec(model, EXAMPLE)
    with pytest.raises(ConfigError, match="the given spec has permutations alone"):
        wrapper(model=model, example_inputs=EXAMPLE, spec=permuting, rotations=True)
    with pytest.raises(ConfigError, match="rotations are for clients of one width, and sizes= has several"):
        wrapper(model=model, example_inputs=EXAMPLE, sizes=[model], rotations=True)


def test_a_reply_that_cannot_be_folded_is_dropped_and_the_others_count() -> None:
    torch.manual_seed(1)
    model = Biasless().eval()
    nn.init.normal_(model.norm.bias)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    spec = permutation_spec(model, EXAMPLE, rotations=True)
    outer = C2M3(FedAvg(fraction_evaluate=0.0), model=model, example_inputs=EXAMPLE, spec=spec)
    flat = {**start, "norm.weight": start["norm.weight"].clone()}
    flat["norm.weight"][2] = 0
    send(outer, start)
    _, metrics = outer.aggregate_train(1, [reply(1, start), reply(2, start), reply(3, flat)])
    assert metrics["c2m3-replies"] == 2
    assert metrics["c2m3-dropped"] == 1
    assert metrics["c2m3-kept-previous"] == 0
