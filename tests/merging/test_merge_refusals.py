"""What a merge refuses, and how the error names it."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.errors import C2M3Error, CalibrationError, ConfigError, ParamsError, SpecError, WeightsError
from c2m3_fl.merging.align.methods import GitReBasin
from c2m3_fl.merging.merge import merge
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.repair import Repair
from c2m3_fl.merging.recalibrate.short_names import Recalibration
from tests.merging.networks import CALIBRATION, nodes, spec_of

_UNFIT = "calibration batch {} cannot be fed .* inputs are torch.{} .* network's tensors are torch.float32"


def test_classes_in_place_of_their_instances_are_named() -> None:
    model = torch.nn.Linear(4, 2)
    node = model.state_dict()
    with pytest.raises(ConfigError, match=r"model is <class .*Linear'>, expected a module such as Net\(\)"):
        merge(torch.nn.Linear, [node, node], example_inputs=torch.zeros(2, 4))  # type: ignore[arg-type]  # on purpose
    for given in ({"a": node, "b": node}, node):
        with pytest.raises(ParamsError, match=r"node 0 is a str, .*; nodes in a dict are passed as list\(nodes.values"):
            merge(model, given, example_inputs=torch.zeros(2, 4))  # type: ignore[arg-type]  # too
    with pytest.raises(ConfigError, match="spec is a str, expected a PermutationSpec"):
        merge(model, [node, node], example_inputs=torch.zeros(2, 4), spec="{}")  # type: ignore[arg-type]  # too
    with pytest.raises(ConfigError, match=r"method is \['cca'\], expected one of"):
        merge(model, [node, node], example_inputs=torch.zeros(2, 4), method=["cca"])  # type: ignore[arg-type]  # too
    with pytest.raises(ConfigError, match=r"recalibrate is the class Repair, expected Repair\(\)"):
        merge(model, [node, node], calibration=[torch.zeros(2, 4)], recalibrate=Repair)  # type: ignore[arg-type]  # too


@pytest.mark.parametrize("recalibrate", ["refit", "batchnorm", "auto", Repair(), Refit()], ids=str)
def test_a_recalibration_that_was_asked_for_is_not_left_out_silently(recalibrate: Recalibration | str) -> None:
    model = torch.nn.Linear(4, 2)
    with pytest.raises(CalibrationError, match=f"{re.escape(repr(recalibrate))} needs calibration inputs"):
        merge(model, [model.state_dict()] * 2, example_inputs=torch.zeros(2, 4), recalibrate=recalibrate)


@pytest.mark.parametrize("shown", ["example_inputs", "calibration"])
def test_a_foreign_spec_is_refused(shown: str) -> None:
    model, params = nodes("mlp", 2)
    spec = spec_of("mlp")
    first = spec.tensors["3.weight"]
    wrong = {**spec.tensors, "3.weight": replace(first, axes=(first.axes[0], ()))}  # its columns stay behind
    inputs: dict[str, Any] = {shown: CALIBRATION[0] if shown == "example_inputs" else CALIBRATION}
    with pytest.raises(SpecError, match="change the outputs"):
        merge(model, params, spec=PermutationSpec(spec.groups, wrong, spec.pins), **inputs)


def test_nodes_of_one_other_type_merge_in_it_and_recalibrate_with_a_model_of_it() -> None:
    model, params = nodes("mlp", 2)
    wide = [{name: value.double() for name, value in node.items()} for node in params]
    merged = merge(model, wide, spec=spec_of("mlp"))
    assert {value.dtype for value in merged.state_dict.values()} == {torch.float64}
    data = [CALIBRATION[0].double()]
    done = merge(copy.deepcopy(model).double(), wide, spec=spec_of("mlp"), calibration=data)
    assert {value.dtype for value in done.state_dict.values()} == {torch.float64}
    for options in ({}, {"method": "activations", "recalibrate": "none"}):
        with pytest.raises(ParamsError, match=r"0: '1.weight' is of type torch.float64, expected torch.float32"):
            merge(model, wide, spec=spec_of("mlp"), calibration=CALIBRATION, **options)


def test_nodes_of_mixed_types_are_refused_by_name() -> None:
    model, (one, two) = nodes("mlp", 2)
    for bad in (two | {"3.bias": two["3.bias"].half()}, {name: value.half() for name, value in two.items()}):
        name = "3.bias" if bad["1.weight"].dtype == torch.float32 else "1.weight"
        with pytest.raises(ParamsError, match=f"node 1: '{name}' is of type torch.float16, expected torch.float32"):
            merge(model, [one, bad], spec=spec_of("mlp"))


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ParamsError, match="node 0: ReLU has no parameters"):
        merge(torch.nn.ReLU(), [{}, {}], example_inputs=CALIBRATION[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": [1.0]}, WeightsError, "got 1, expected one for each of the 2 nodes"),
        ({"weights": [1.0, -1.0]}, WeightsError, r"weights\[1\] is -1.0"),
        ({"weights": [0.0, 0.0]}, WeightsError, "all zero"),
        ({"weights": [1.0, float("nan")]}, WeightsError, r"weights\[1\] is nan"),
        ({"basis": 2}, ConfigError, "basis is 2, expected the index of one of the 2 nodes"),
        ({"basis": True}, ConfigError, "basis is True, expected the index"),
        ({"basis": 0.0}, ConfigError, "basis is 0.0, expected the index"),
        ({"weights": ["a", 1]}, WeightsError, r"weights\[0\] is no number"),
        ({"method": "mean", "start": "random"}, ConfigError, "start is for method 'c2m3', not for 'mean'"),
        ({"method": GitReBasin(), "start": [{}, {}]}, ConfigError, "start is for method 'c2m3', not for GitReBasin"),
        ({"recalibrate": "magic"}, ConfigError, "recalibrate is 'magic', expected one of 'auto', 'none'"),
        ({"recalibrate": True}, ConfigError, "recalibrate is True, expected one of 'auto'"),
        ({"moments": [{}, {}], "calibration": CALIBRATION}, ConfigError, 'only recalibrate="auto" with'),
        ({"moments": [{}, {}], "recalibrate": "auto"}, ConfigError, 'only recalibrate="auto" with'),
        ({"device": "gpu"}, ConfigError, "device is 'gpu', which cannot be used here"),
        ({"weights": {0: 1, 1: 2}}, WeightsError, "weights are a mapping, expected one number per node"),
        ({"method": dict}, ConfigError, "method is the class dict, expected an object"),
        ({"method": "magic"}, ConfigError, "method is 'magic', expected one of 'mean'"),
        ({"start": "magic"}, ConfigError, "magic"),
        ({"calibration": []}, CalibrationError, "empty"),
        ({"calibration": [CALIBRATION[0].byte()]}, CalibrationError, "torch.uint8"),
        ({"calibration": [CALIBRATION[0], CALIBRATION[0].double()]}, CalibrationError, _UNFIT.format(1, "float64")),
        ({"calibration": [CALIBRATION[0].double()]}, CalibrationError, _UNFIT.format(0, "float64")),
        ({"calibration": [CALIBRATION[0].long()]}, CalibrationError, _UNFIT.format(0, "int64")),
        ({"calibration": [CALIBRATION[0].long()], "spec": None}, CalibrationError, _UNFIT.format(0, "int64")),
        ({"calibration": [CALIBRATION[0][:, :1]], "spec": None}, CalibrationError, r"shape \(32, 1, 8, 8\)"),
        ({"spec": None}, CalibrationError, "neither example_inputs nor calibration"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], error: type[C2M3Error], message: str) -> None:
    model, params = nodes("mlp", 2)
    with pytest.raises(error, match=message):
        merge(model, params, **{"spec": spec_of("mlp"), **options})


def _without(params: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {other: value for other, value in params.items() if other != name}


def test_nodes_that_do_not_fit_are_refused_by_name() -> None:
    model, (one, two) = nodes("mlp", 2)
    for bad, message in [
        ([], "state_dicts: got none"),
        ([one, _without(two, "3.bias")], r"node 1: keys differ .* missing \['3.bias'\]"),
        ([{**one, "extra": one["3.bias"]}, two], r"node 0: keys differ .* unexpected \['extra'\]"),
        ([one, model], r"node 1 is the module Sequential, expected its state_dict\(\)"),
        ([[1, 2], two], "node 0 is a list, expected a state dict"),
        ([one, {**two, "3.bias": [0.0] * 12}], "node 1: '3.bias' is a list, expected a tensor"),
        ([one, {**two, "3.bias": torch.zeros(1)}], r"node 1: '3.bias' has shape \(1,\), expected \(12,\)"),
        ([one, {**two, "3.bias": torch.full((12,), torch.inf)}], "node 1: '3.bias' holds NaN or infinite"),
        ([one, {**two, "3.bias": torch.zeros(12, dtype=torch.int64)}], "node 1: '3.bias' is of type torch.int64"),
    ]:
        with pytest.raises(ParamsError, match=message):
            merge(model, bad, spec=spec_of("mlp"))
