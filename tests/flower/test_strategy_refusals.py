"""Options and models that C2M3 refuses, and how the error names them."""

from __future__ import annotations

import pytest
import torch
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.strategy import FedAvg, FedXgbBagging, FedXgbCyclic

from c2m3_fl.errors import CalibrationError, ConfigError, ParamsError
from c2m3_fl.flower import LegacyC2M3
from c2m3_fl.flower.queries.repair import ClientStatistics
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, calibration, mlp, reply, send


class Raw(torch.nn.Module):
    """A layer of its own making, which no rule measures."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(10, 64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weight.T


BAD_OPTIONS = {
    "model": ({"model": torch.nn.Linear}, ConfigError, r"expected a module such as Net\(\)"),
    "state dict": (
        {"model": mlp().state_dict()},
        ConfigError,
        r"^model is a OrderedDict, expected a module such as Net",
    ),
    "model first": (
        {"strategy": mlp()},
        ConfigError,
        "strategy is a torch.*Sequential, .*; pass the network as model=",
    ),
    "moments": ({"moments": 1}, ConfigError, r"moments is 1, expected ClientStatistics\(\)"),
    "moments for nobody": (
        {"moments": ClientStatistics(), "calibration": calibration(), "recalibrate": "repair"},
        ConfigError,
        r'moments serve recalibrate="auto" and None, not Repair',
    ),
    "moments of nothing": (
        {"model": Raw(), "moments": ClientStatistics(), "calibration": calibration()},
        ConfigError,
        r"none that can be measured \(weight: used by .*\): leave ClientStatistics out",
    ),
    "statistics of nothing": (
        {"model": Raw(), "calibration": ClientStatistics(), "example_inputs": EXAMPLE},
        ConfigError,
        r"none that can be measured \(weight: used by .*\): leave ClientStatistics out",
    ),
    "unknown": ({"colour": "red"}, ConfigError, "C2M3 has no option 'colour'$"),
    "misspelt": ({"recalibrat": "repair"}, ConfigError, r"no option 'recalibrat'; did you mean 'recalibrate'\?"),
    "of the legacy FedAvg": ({"fraction_fit": 0.5}, ConfigError, r"pass FedAvg\(fraction_train=...\) as strategy"),
    "of the legacy start": ({"initial_parameters": []}, ConfigError, r"pass start\(initial_arrays=...\)"),
    "feedback": ({"feedback": "now"}, ConfigError, "feedback is 'now', expected 'never'"),
    "deploy": ({"deploy": "first"}, ConfigError, "deploy is 'first', expected 'last'"),
    "deploy never": ({"deploy": 0}, ConfigError, "deploy is 0, expected a whole number"),
    "head": ({"head": "hydra"}, ConfigError, "head is 'hydra'"),
    "judge": ({"judge": "dredd"}, ConfigError, "judge is 'dredd'"),
    "judge_key without a judge": (
        {"judge": None, "judge_key": "loss"},
        ConfigError,
        "judge_key is 'loss', but judge is None",
    ),
    "judge without labels": ({"judge": "labels"}, CalibrationError, "needs calibration data with labels"),
    "repair without data": ({"recalibrate": "repair"}, CalibrationError, "needs calibration inputs"),
    "alignment": ({"alignment": "none"}, ConfigError, "alignment is 'none'"),
    "basis": ({"basis": "mine"}, ConfigError, "basis is 'mine'"),
    "min_replies": ({"min_replies": 0}, ConfigError, "min_replies is 0"),
    "min_replies in part": ({"min_replies": 1.5}, ConfigError, "min_replies is 1.5, expected a whole number"),
    "min_replies in words": ({"min_replies": "2"}, ConfigError, "min_replies is '2', expected a whole number"),
    "max_steps": ({"max_steps": -1}, ConfigError, "max_steps is -1"),
    "max_steps in part": ({"max_steps": 2.5}, ConfigError, "max_steps is 2.5"),
    "tolerance": ({"tolerance": -1e-4}, ConfigError, "tolerance is -0.0001"),
    "tolerance NaN": ({"tolerance": float("nan")}, ConfigError, "tolerance is nan"),
    "tolerance in words": ({"tolerance": "low"}, ConfigError, "tolerance is 'low'"),
    "device": ({"device": "abacus"}, ConfigError, "device is 'abacus'"),
    "absent device": ({"device": "cuda:99"}, ConfigError, "device is 'cuda:99'"),
    "device without values": ({"device": "meta"}, ConfigError, "device is 'meta'"),
    "itself": ({"strategy": C2M3(model=mlp(), example_inputs=EXAMPLE)}, ConfigError, "strategy is a C2M3 already"),
    "strategy class": ({"strategy": FedAvg}, ConfigError, r"strategy is the class FedAvg, .* FedAvg\(\)"),
    "legacy strategy": (
        {"strategy": LegacyFedAvg()},
        ConfigError,
        "expected an instance of flwr.serverapp.strategy.*; use LegacyC2M3 of c2m3_fl.flower, which takes it",
    ),
    "option of start": ({"num_rounds": 3}, ConfigError, r"belongs to its method start: pass start\(num_rounds=...\)"),
    "bagged trees": ({"strategy": FedXgbBagging()}, ConfigError, "FedXgbBagging, which collects trees"),
    "trees in turn": ({"strategy": FedXgbCyclic()}, ConfigError, "FedXgbCyclic, which collects trees"),
    "outliers": ({"outliers": "keep"}, ConfigError, "outliers is 'keep'"),
    "memory": ({"memory": -1}, ConfigError, "memory is -1"),
    "refit without data": ({"recalibrate": "refit"}, CalibrationError, "'refit' needs calibration inputs"),
    "recalibrate": ({"recalibrate": "mend"}, ConfigError, "recalibrate is 'mend'"),
    "no inputs": ({"example_inputs": None}, CalibrationError, "neither example_inputs nor calibration"),
    "moments alone": (
        {"example_inputs": None, "calibration": ClientStatistics()},
        CalibrationError,
        r"ClientStatistics\(\) shows the server no input: pass example_inputs",
    ),
    "empty calibration": ({"example_inputs": None, "calibration": []}, CalibrationError, "empty"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options_are_refused_before_any_round(options, error, message):
    with pytest.raises(error, match=message):
        C2M3(**{"model": mlp(), "example_inputs": EXAMPLE, **options})


def test_the_legacy_strategy_names_options_of_the_current_one():
    for option, message in {
        "fraction_train": r"pass FedAvg\(fraction_fit=...\) as strategy",
        "initial_arrays": r"pass FedAvg\(initial_parameters=...\) as strategy",
        "calibratoin": "did you mean 'calibration'",
    }.items():
        with pytest.raises(ConfigError, match=f"C2M3 has no option '{option}'.*{message}"):
            LegacyC2M3(model=mlp(), example_inputs=EXAMPLE, **{option: 1})


def test_sending_out_a_model_that_does_not_fit_is_refused():
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE)
    with pytest.raises(
        ParamsError, match=r"the arrays to send out: '0.weight' has shape \(8, 64\), expected \(32, 64\)"
    ):
        send(strategy, mlp(width=8).state_dict())
    with pytest.raises(
        ParamsError,
        match=r"arrays to send out: keys differ from the model's: missing \[\], unexpected \['6.weight'\]; start with",
    ):
        send(strategy, {**mlp().state_dict(), "6.weight": torch.zeros(1)})


class Masked(torch.nn.Module):
    """Scores of which one is masked out."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.register_buffer("mask", torch.tensor([-float("inf")] + [0.0] * 9))

    def forward(self, x):
        return (self.layer(x) + self.mask).softmax(-1)


def test_a_mask_of_infinities_is_named_with_what_to_do_about_it():
    model = Masked()
    strategy = C2M3(model=model, example_inputs=EXAMPLE)
    with pytest.raises(
        ParamsError, match=r"the buffer 'mask' holds NaN or infinities, .* persistent=False, or exchange"
    ):
        send(strategy, model.state_dict())
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    send(strategy, parameters)
    _, metrics = strategy.aggregate_train(1, [reply(node, parameters) for node in range(2)])
    assert (metrics["c2m3-replies"], metrics["c2m3-kept-previous"]) == (2, 0)


def test_a_model_in_bfloat16_is_refused_with_advice():
    with pytest.raises(ParamsError, match=r"bfloat16.*\.float\(\)"):
        C2M3(model=mlp().bfloat16(), example_inputs=EXAMPLE.bfloat16())
