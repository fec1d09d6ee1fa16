"""Adapters under PEFT's own names: those of `get_peft_model_state_dict`, which the model's state dict does not have."""

from __future__ import annotations

import warnings

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.clientapp import ClientApp
from flwr.server.client_manager import SimpleClientManager
from torch import nn

from c2m3_fl.errors import ConfigError, ParamsError
from c2m3_fl.flower import LegacyC2M3
from c2m3_fl.flower.exchanged import model_names
from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, mlp, reply, send
from tests.flower.legacy_federation import Local, fit_result, parameters_of, params_of

NAMES = ["a.lora_A.weight", "a.lora_B.weight", "a.lora_embedding_A", "a.lora_magnitude_vector", "head.weight", "a.bias"]
OWN = [
    "a.lora_A.default.weight",
    "a.lora_B.default.weight",
    "a.lora_embedding_A.default",
    "a.lora_magnitude_vector.default.weight",
    "head.modules_to_save.default.weight",
    "a.bias",
]


class Layer(nn.Module):
    """A layer with an adapter in PEFT's containers."""

    def __init__(self, base, adapters=("default",)):
        super().__init__()
        self.base_layer = base
        rows, columns = base.weight.shape
        self.lora_A = nn.ModuleDict({each: nn.Linear(columns, 2, bias=False) for each in adapters})
        self.lora_B = nn.ModuleDict({each: nn.Linear(2, rows, bias=False) for each in adapters})
        self.scaling = dict.fromkeys(adapters, 0.5)

    def forward(self, x):
        (first, *_) = self.scaling
        return self.base_layer(x) + self.scaling[first] * self.lora_B[first](self.lora_A[first](x))


def adapted(adapters=("default",)):
    model = mlp()
    torch.manual_seed(0)
    model[2] = Layer(model[2], adapters)
    return model


def sent(model=None):
    """As `get_peft_model_state_dict` gives them."""
    return {n.replace(".default", ""): v for n, v in (model or adapted()).state_dict().items() if "lora" in n}


def replies():
    draws = [torch.Generator().manual_seed(seed) for seed in range(3)]
    return [{name: torch.randn(value.shape, generator=each) for name, value in sent().items()} for each in draws]


def test_the_adapter_s_name_may_be_left_out_where_peft_leaves_it_out():
    assert model_names(NAMES, [*OWN, "base.weight"]) == dict(zip(NAMES, OWN, strict=True))
    assert model_names(OWN, OWN) == {name: name for name in OWN}
    mixed = [NAMES[0], OWN[1]]
    assert model_names(mixed, OWN) == {NAMES[0]: OWN[0], OWN[1]: OWN[1]}
    assert model_names(["a.weight"], ["a.0.weight"]) is None, "0 is not an adapter"
    assert model_names(["a.lora_A.bias"], OWN) is None


def test_names_of_several_adapters_are_refused():
    with pytest.raises(ConfigError, match=r"are tensors of the adapters \['default', 'other'\] of the model"):
        model_names(list(sent()), adapted(("default", "other")).state_dict())


@pytest.mark.parametrize("lora", ["apart", "exact"])
@pytest.mark.parametrize("named", [False, True])
def test_a_round_under_peft_s_names_is_the_round_under_the_model_s(named, lora):
    given = replies()
    own = [{name.replace(".weight", ".default.weight"): value for name, value in each.items()} for each in given]
    start = {name.replace(".weight", ".default.weight"): value for name, value in sent().items()}
    found = []
    for arrays, first in ((given, sent()), (own, start)):
        options = {"exchanged": list(first)} if named else {}
        strategy = C2M3(model=adapted(), example_inputs=EXAMPLE, lora=lora, **options)
        for number in (1, 2):
            messages = send(strategy, first, round_number=number)
            assert all(set(each.content["arrays"]) == set(first) for each in messages)
            result, metrics = strategy.aggregate_train(number, [reply(n, each) for n, each in enumerate(arrays)])
            assert (metrics["c2m3-kept-previous"], metrics["c2m3-dropped"]) == (0, 0)
            first = to_params(result)
        found.append(first)
    assert list(found[0]) == list(sent())
    assert all(torch.equal(one, other) for one, other in zip(found[0].values(), found[1].values(), strict=True))


def test_what_was_remembered_under_peft_s_names_is_taken_up_again():
    first, second = (C2M3(model=adapted(), example_inputs=EXAMPLE) for _ in range(2))
    send(first, sent())
    arrays, _ = first.aggregate_train(1, [reply(n, each) for n, each in enumerate(replies())])
    second.load_state_dict(first.state_dict())
    (message, *_) = second.configure_train(2, arrays, ConfigRecord(), SerialGrid(ClientApp(), 2))
    assert dict(message.content["arrays"]) == dict(arrays)


class Rooted(Layer):
    """NaN where one element of the adapter is negative."""

    def forward(self, x):
        return super().forward(x) + self.lora_A["default"].weight[0, 0].sqrt()


def test_a_merged_model_is_run_with_what_clients_send_under_peft_s_names(caplog):
    model = mlp()
    model[2] = Rooted(model[2])
    model[2].lora_A["default"].weight.data[0, 0] = 1.0
    strategy = C2M3(model=model, example_inputs=EXAMPLE)
    send(strategy, sent(model))
    negative = {name: -value for name, value in sent(model).items()}
    _, metrics = strategy.aggregate_train(1, [reply(n, negative) for n in range(2)])
    assert metrics["c2m3-kept-previous"] == 1
    assert any("the merged model gives NaN on the example inputs" in text for text in caplog.messages)


def test_the_legacy_dialect_takes_a_part_in_the_order_that_is_named():
    """No names travel: B before A, which is not the model's order."""
    names = list(sent())[::-1]
    strategy = LegacyC2M3(model=adapted(), example_inputs=EXAMPLE, exchanged=names, lora="exact")
    current = C2M3(model=adapted(), example_inputs=EXAMPLE, lora="exact")
    send(current, sent())
    expected = to_params(current.aggregate_train(1, [reply(n, each) for n, each in enumerate(replies())])[0])
    manager = SimpleClientManager()
    manager.register(Local(0, 2))
    manager.register(Local(1, 2))
    strategy.configure_fit(1, parameters_of({name: sent()[name] for name in names}), manager)
    results = [fit_result(n, {name: each[name] for name in names}) for n, each in enumerate(replies())]
    parameters, metrics = strategy.aggregate_fit(1, results, [])
    assert metrics["c2m3-dropped"] == 0
    for name, value in params_of(parameters, names).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert strategy.wrapped is strategy.strategy


@pytest.mark.parametrize(
    ("exchanged", "message"),
    [
        ({"4.weight"}, "exchanged is a set, expected a list of names in the order in which clients send them"),
        (["4.weight", "4.weight"], "exchanged holds '4.weight', expected names, every one of them once"),
        ([4], "exchanged holds 4, expected names"),
        (4, "exchanged is a int, expected a list of names"),
    ],
)
def test_names_without_an_order_or_twice_are_refused(exchanged, message):
    with pytest.raises(ConfigError, match=message):
        LegacyC2M3(model=mlp(), example_inputs=EXAMPLE, exchanged=exchanged)


def test_names_that_are_nobody_s_are_refused_with_what_to_start_with():
    with pytest.raises(ParamsError, match=r"keys differ from the model's: missing \['0.weight', .*; start with"):
        send(C2M3(model=adapted(), example_inputs=EXAMPLE), {"a.lora_A.weight": torch.zeros(2)})


@pytest.mark.slow
def test_a_model_of_peft_itself():
    peft = pytest.importorskip("peft", reason="installed by the extra dev alone")
    config = peft.LoraConfig(r=2, target_modules=["2"], modules_to_save=["4"])
    with warnings.catch_warnings(action="ignore"):  # of the layer that PEFT keeps beside the one it trains
        model = peft.get_peft_model(mlp(), config)
        given = peft.get_peft_model_state_dict(model)
        strategy = C2M3(model=model, example_inputs=EXAMPLE, lora="exact")
    send(strategy, given)
    other = {name: value + 1 for name, value in given.items()}
    arrays, metrics = strategy.aggregate_train(1, [reply(0, given), reply(1, other)])
    assert metrics["c2m3-kept-previous"] == 0
    assert isinstance(arrays, ArrayRecord)
    assert list(arrays) == list(given)
    loaded = peft.set_peft_model_state_dict(model, to_params(arrays))
    assert not loaded.unexpected_keys
