"""What all clients, or the user, do in the same way: taken where it can be, and otherwise said at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.strategy import FedAdam
from torch import nn

from c2m3_fl.errors import ConfigError, ParamsError
from c2m3_fl.flower import legacy as legacy_dialect
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.resuming.resumable import Resumable
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import (
    EXAMPLE,
    aggregate,
    answer,
    clients,
    digits_app,
    good,
    mlp,
    reply,
    same,
    send,
    with_array,
)
from tests.flower.legacy_federation import fit_result, legacy, params_of

PRECISIONS = [torch.float16, torch.float64]


def cast(params, dtype):
    return {name: value.to(dtype) for name, value in params.items()}


def as_bfloat16(message: Message) -> Message:
    """The arrays as ml_dtypes saves them."""
    for name, array in message.content["arrays"].items():
        value = torch.from_numpy(array.numpy().copy()).bfloat16()
        raw = value.view(torch.uint8).numpy().tobytes()
        header = f"{{'descr': '<V2', 'fortran_order': False, 'shape': {tuple(value.shape)}, }}\n".encode()
        data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + raw
        message.content["arrays"][name] = Array("bfloat16", tuple(value.shape), "numpy.ndarray", data)
    return message


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_replies_of_other_precisions_are_cast_and_counted(dtype):
    expected, _ = aggregate([reply(n, cast(cast(params, dtype), torch.float32)) for n, params in enumerate(clients(3))])
    arrays, metrics = aggregate([reply(n, cast(params, dtype)) for n, params in enumerate(clients(3))])
    assert same(arrays, expected)
    assert (metrics["c2m3-cast"], metrics["c2m3-dropped"]) == (3, 0)
    assert aggregate(good())[1]["c2m3-cast"] == 0


def test_replies_in_bfloat16_are_cast_and_counted():
    rounded = [cast(cast(params, torch.bfloat16), torch.float32) for params in clients(3)]
    expected, _ = aggregate([reply(n, params) for n, params in enumerate(rounded)])
    arrays, metrics = aggregate([as_bfloat16(reply(n, params)) for n, params in enumerate(clients(3))])
    assert same(arrays, expected)
    assert metrics["c2m3-cast"] == 3


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_legacy_results_of_other_precisions_are_cast_and_counted(dtype):
    rounded = [fit_result(n, cast(cast(params, dtype), torch.float32)) for n, params in enumerate(clients(3))]
    expected, _ = legacy().aggregate_fit(1, rounded, [])
    results = [fit_result(n, cast(params, dtype)) for n, params in enumerate(clients(3))]
    parameters, metrics = legacy().aggregate_fit(1, results, [])
    assert parameters.tensors == expected.tensors
    assert metrics["c2m3-cast"] == 3
    assert {value.dtype for value in params_of(parameters, mlp().state_dict()).values()} == {torch.float32}


@pytest.mark.parametrize("value", [1e300, 65504.0 * 2])
def test_what_the_other_precision_does_not_hold_costs_the_reply(value):
    params = cast(clients(4)[3], torch.float64 if value > 1e38 else torch.float16)
    params["2.bias"][0] = value
    _, metrics = aggregate([*good(), reply(9, params)])
    assert (metrics["c2m3-dropped"], metrics["c2m3-cast"]) == (1, 0)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_compiled_and_parallel_models_are_taken_off(prefix):
    expected, _ = aggregate(good())
    renamed = [{prefix + name: value for name, value in params.items()} for params in clients(3)]
    arrays, metrics = aggregate([reply(node, params) for node, params in enumerate(renamed)])
    assert same(arrays, expected)
    assert metrics["c2m3-dropped"] == 0
    mixed, _ = aggregate([reply(0, renamed[0]), *good()[1:]])
    assert same(mixed, expected)


def test_a_prefix_within_a_name_is_taken_off_and_clashing_names_are_not_guessed():
    expected, _ = aggregate(good())
    inner = [{name.replace("2.", "2._orig_mod."): value for name, value in params.items()} for params in clients(3)]
    assert same(aggregate([reply(node, params) for node, params in enumerate(inner)])[0], expected)
    clash = {**clients(4)[3], "module.2.bias": torch.zeros(32)}
    _, metrics = aggregate([*good(), reply(9, clash)])
    assert metrics["c2m3-dropped"] == 1


def test_clients_may_send_bare_names_to_a_wrapped_model():
    model = torch.nn.DataParallel(mlp())
    strategy = C2M3(model=model, example_inputs=EXAMPLE)
    arrays, metrics = aggregate(good(), strategy, model.state_dict())
    assert metrics["c2m3-dropped"] == 0
    assert {f"module.{name}" for name in mlp().state_dict()} == set(arrays)


def every(change):
    """A mistake that all clients make."""
    return [change(node, params) for node, params in enumerate(clients(3))]


def extra(node, params):
    return reply(node, {**params, "ema": torch.zeros(node + 1)})


SHARED = {
    "an array too many": (extra, r"keys differ .* unexpected \['ema'\]"),
    "an array too few": (lambda n, params: reply(n, dict(list(params.items())[1:])), r"missing \['0.weight'\]"),
    "another architecture": (lambda n, params: reply(n, mlp(width=8).state_dict()), r"has shape \(8, 64\)"),
    "integers": (lambda n, params: reply(n, cast(params, torch.int64)), "has dtype int64, expected float32"),
    "no weight": (lambda n, params: reply(n, params, examples=None), "weight 'num-examples' is missing"),
    "a weight of zero": (lambda n, params: reply(n, params, examples=0), "weight 'num-examples' is 0"),
    "complex": (
        lambda n, params: with_array(reply(n, params), "0.bias", Array(np.zeros(32, "complex64"))),
        "has dtype complex64",
    ),
    "an exception": (
        lambda n, params: answer(n, Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"at {n}\nKeyError: 'img'")),
        "the client failed: KeyError: 'img'",
    ),
}


@pytest.mark.parametrize(("change", "reason"), SHARED.values(), ids=SHARED.keys())
def test_a_first_round_in_which_all_replies_fail_for_one_reason_ends_the_run_with_it(change, reason):
    with pytest.raises(ParamsError, match=rf"none of the 3 replies of the first round .* for one reason: .*{reason}"):
        aggregate(every(change))


def test_a_legacy_run_ends_with_the_reason_as_well():
    results = [fit_result(node, mlp(width=8).state_dict()) for node in range(3)]
    with pytest.raises(ParamsError, match=r"none of the 3 replies .*\(8, 64\)"):
        legacy().aggregate_fit(1, results, [])


def unreachable(node, params):
    return answer(node, Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"))


GOING_ON = {
    "one reply": lambda: [extra(0, clients(1)[0])],
    "two reasons": lambda: [extra(0, clients(1)[0]), reply(1, clients(1)[0], examples=0)],
    "nodes that cannot be reached": lambda: every(unreachable),
    "NaN": lambda: every(lambda n, params: reply(n, {name: value * np.nan for name, value in params.items()})),
    "too large": lambda: every(lambda n, params: reply(n, {name: value * 1e30 for name, value in params.items()})),
    "one good reply": lambda: [*every(extra), reply(7, clients(1)[0])],
    "nobody": list,
}


@pytest.mark.parametrize("make", GOING_ON.values(), ids=GOING_ON.keys())
def test_faults_that_may_be_over_in_the_next_round_do_not_end_the_run(make):
    _, metrics = aggregate(make())
    assert metrics["c2m3-kept-previous"] == (metrics["c2m3-replies"] == 0)


def test_in_a_later_round_the_previous_model_stays():
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE)
    arrays, _ = aggregate(good(), strategy)
    send(strategy, to_params(arrays), round_number=2)
    found, metrics = strategy.aggregate_train(2, every(extra))
    assert same(found, arrays)
    assert metrics["c2m3-kept-previous"] == 1


def test_a_run_whose_clients_all_fail_ends_in_the_first_round():
    app = ClientApp()

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"examples": 5})
        return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)

    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE)
    with pytest.raises(ParamsError, match=r"'num-examples' is missing from the MetricRecord, which has \['examples'\]"):
        strategy.start(SerialGrid(app, 3), from_params(mlp().state_dict()), num_rounds=50)


OPTIONS = [
    (C2M3, {"fraction_evaluate": 0.5}, r"no option 'fraction_evaluate'.*pass FedAvg\(fraction_evaluate=\.\.\.\)"),
    (C2M3, {"min_available_nodes": 5}, r"pass FedAvg\(min_available_nodes"),
    (C2M3, {"eta": 0.1}, r"pass FedAdam\(eta=\.\.\.\)"),
    (C2M3, {"num_malicious_nodes": 1}, r"pass Krum\(num_malicious_nodes"),
    (legacy_dialect.C2M3, {"min_fit_clients": 5}, r"pass FedAvg\(min_fit_clients"),
]


@pytest.mark.parametrize(("kind", "options", "message"), OPTIONS)
def test_options_of_the_strategy_inside_are_named_with_where_they_belong(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(model=mlp(), example_inputs=EXAMPLE, **options)


def test_a_subclass_has_options_of_its_own():
    class Mine(C2M3):
        def __init__(self, eta: float, **options) -> None:
            super().__init__(FedAdam(eta=eta), **options)

    assert Mine(0.5, model=mlp(), example_inputs=EXAMPLE).strategy.eta == 0.5


@pytest.mark.parametrize("resumable", [False, True])
def test_a_state_dict_as_initial_arrays_is_named_with_what_to_pass(resumable, tmp_path):
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE)
    runner = Resumable(strategy, tmp_path) if resumable else strategy
    with pytest.raises(
        ParamsError, match=r"a state dict, expected an ArrayRecord; pass ArrayRecord\(model\.state_dict"
    ):
        runner.start(SerialGrid(digits_app(), 2), mlp().state_dict(), num_rounds=1)


def test_a_list_as_legacy_initial_parameters_is_named_with_what_to_pass():
    values = [value.numpy() for value in mlp().state_dict().values()]
    strategy = legacy_dialect.C2M3(LegacyFedAvg(initial_parameters=values), model=mlp(), example_inputs=EXAMPLE)
    with pytest.raises(ParamsError, match=r"a list, expected Parameters; pass ndarrays_to_parameters"):
        strategy.configure_fit(1, strategy.initialize_parameters(None), None)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_initial_arrays_with_a_prefix_that_the_model_lacks_are_named(wrap):
    wrapped = wrap(mlp())
    with pytest.raises(ParamsError, match=r"is '0\.weight' in the model .* torch\.compile and DataParallel"):
        send(C2M3(model=mlp(), example_inputs=EXAMPLE), wrapped.state_dict())
    with pytest.raises(ParamsError, match=r"'0\.weight' is '(module|_orig_mod)\.0\.weight' in the model"):
        send(C2M3(model=wrapped, example_inputs=EXAMPLE), mlp().state_dict())
    head = {name: value for name, value in wrapped.state_dict().items() if "4." in name}
    with pytest.raises(ParamsError, match=r"is '4\.weight' in the model .* torch\.compile and DataParallel"):
        send(C2M3(model=mlp(), example_inputs=EXAMPLE), head)
