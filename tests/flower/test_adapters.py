"""Federations that exchange adapters on one base, which stays where it is."""

from __future__ import annotations

import pytest
import torch
from flwr.serverapp.strategy import FedAvg, FedMedian, FedProx
from torch import nn

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.strategy import C2M3
from tests.benchmarks.adapters import Adapted, adapters
from tests.flower.federation import EXAMPLE, mlp, reply, send


def adapted(seed=0):
    """The perceptron with an adapter of rank 2 on its middle layer."""
    model = mlp()
    torch.manual_seed(seed)
    model[2] = Adapted(model[2], rank=2)
    return model


def trained(seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {k: size * torch.randn(v.shape, generator=generator) for k, v in adapters(adapted()).items()}


def product(params):
    return params["2.lora_B"] @ params["2.lora_A"]


def merge(lora, replies, examples):
    strategy = C2M3(FedAvg(), model=adapted(), example_inputs=EXAMPLE, lora=lora)
    send(strategy, adapters(adapted()))
    messages = [
        reply(node, each, examples=count) for node, (each, count) in enumerate(zip(replies, examples, strict=True))
    ]
    arrays, metrics = strategy.aggregate_train(1, messages)
    assert metrics["c2m3-kept-previous"] == 0
    return to_params(arrays)


def test_exact_adapters_add_the_weighted_mean_of_what_the_clients_add():
    """Up to its best approximation of rank two."""
    replies = [trained(seed) for seed in range(3)]
    whole = sum(weight / 10 * product(each).double() for weight, each in zip((2, 3, 5), replies, strict=True))
    left, sizes, right = torch.linalg.svd(whole)
    best = left[:, :2] * sizes[:2] @ right[:2]
    found = product(merge("exact", replies, (2, 3, 5))).double()
    apart = product(merge("apart", replies, (2, 3, 5))).double()
    torch.testing.assert_close(found, best, atol=1e-4, rtol=1e-4)
    assert float((found - whole).norm()) < float((apart - whole).norm())


def test_units_inside_an_adapter_in_another_order_are_found():
    """The rows of A and the columns of B are units that both exchanged tensors carry as a whole."""
    own = trained(0)
    other = {"2.lora_A": own["2.lora_A"].flip(0), "2.lora_B": own["2.lora_B"].flip(1)}
    for lora in ("apart", "exact"):
        torch.testing.assert_close(product(merge(lora, [own, other], (1, 1))), product(own), atol=1e-4, rtol=1e-4)


def whole(seed):
    """All arrays of a client: its own adapter, too small to move units of the base, which is that of all."""
    return {**adapted().state_dict(), **trained(seed, 0.1)}


@pytest.mark.parametrize("names", [None, ["2.base.weight", "2.lora_A", "2.lora_B"]], ids=["whole", "a part"])
def test_with_the_residual_the_model_is_that_of_the_mean_of_the_products(names):
    """Base + B A is the base of before plus the weighted mean of the clients' products, exactly."""
    replies, before = [whole(seed) for seed in range(3)], whole(0)
    if names:
        replies, before = ([{n: each[n] for n in names} for each in given] for given in (replies, [before]))
        (before,) = before
    strategy = C2M3(FedAvg(), model=adapted(), example_inputs=EXAMPLE, lora="residual", exchanged=names)
    send(strategy, before)
    messages = [
        reply(node, each, examples=count) for node, (each, count) in enumerate(zip(replies, (2, 3, 5), strict=True))
    ]
    arrays, metrics = strategy.aggregate_train(1, messages)
    assert metrics["c2m3-kept-previous"] == 0
    found = to_params(arrays)
    mean = sum(weight / 10 * product(each) for weight, each in zip((2, 3, 5), replies, strict=True))
    torch.testing.assert_close(
        found["2.base.weight"] + product(found), before["2.base.weight"] + mean, atol=1e-6, rtol=1e-5
    )
    assert not torch.allclose(found["2.base.weight"], before["2.base.weight"], atol=1e-3)
    best = product(merge("exact", [trained(seed, 0.1) for seed in range(3)], (2, 3, 5)))
    torch.testing.assert_close(product(found), best, atol=1e-6, rtol=1e-4)


def test_a_base_that_clients_never_receive_cannot_take_the_residual():
    message = r"lora='residual' changes \['2.base.weight'\], which the clients do not exchange"
    with pytest.raises(ConfigError, match=message):
        C2M3(model=adapted(), example_inputs=EXAMPLE, lora="residual", exchanged=list(adapters(adapted())))
    strategy = C2M3(model=adapted(), example_inputs=EXAMPLE, lora="residual")
    with pytest.raises(ConfigError, match=message):
        send(strategy, adapters(adapted()))


def test_arrays_without_adapters_are_refused():
    with pytest.raises(ConfigError, match="there are no adapters, named lora_A and lora_B, among the arrays"):
        C2M3(model=mlp(), example_inputs=EXAMPLE, lora="exact")
    with pytest.raises(ConfigError, match="there are no adapters"):
        send(C2M3(model=adapted(), example_inputs=EXAMPLE, lora="exact"), {"4.bias": mlp().state_dict()["4.bias"]})


@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(proximal_mu=0.1)])
def test_strategies_that_average_may_be_inside(strategy):
    C2M3(strategy, model=adapted(), example_inputs=EXAMPLE, lora="exact")


@pytest.mark.parametrize(
    ("strategy", "lora", "message"),
    [
        (FedMedian(), "exact", "FedMedian does not"),
        (FedAvg(), "both", "lora is 'both', expected 'apart', 'exact' or 'residual'"),
    ],
)
def test_what_does_not_fit_is_refused(strategy, lora, message):
    with pytest.raises(ConfigError, match=message):
        C2M3(strategy, model=adapted(), example_inputs=EXAMPLE, lora=lora)


def test_an_adapter_that_has_learnt_nothing_changes_nothing():
    with torch.no_grad():
        torch.testing.assert_close(adapted()(EXAMPLE + 1), mlp()(EXAMPLE + 1))
    assert isinstance(adapted()[2], nn.Module)
