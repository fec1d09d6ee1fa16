from __future__ import annotations

import copy
import re
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.errors import C2M3Error, CalibrationError, ConfigError, ParamsError, SpecError, WeightsError
from c2m3_fl.merging.align.methods import METHODS, GitReBasin
from c2m3_fl.merging.merge import merge
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.repair import Repair
from c2m3_fl.merging.recalibrate.short_names import SHORT_NAMES, Recalibration
from c2m3_fl.network import program
from c2m3_fl.symmetry.discover import permutation_spec
from tests.merging.networks import CALIBRATION, NETWORKS, nodes, outputs

SEED = torch.Generator().manual_seed
SPECS: dict[str, PermutationSpec] = {}


def spec_of(network: str) -> PermutationSpec:
    if network not in SPECS:
        SPECS[network] = permutation_spec(NETWORKS[network]().eval(), CALIBRATION[0])
    return SPECS[network]


_UNFIT = "calibration batch {} cannot be fed .* inputs are torch.{} .* network's tensors are torch.float32"


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("recalibrate", SHORT_NAMES)
@pytest.mark.parametrize("network", NETWORKS)
def test_merging_identical_nodes_changes_nothing(network: str, recalibrate: str) -> None:
    model, (node,) = nodes(network, 1)
    options: dict[str, Any] = {"calibration": CALIBRATION, "recalibrate": recalibrate, "weights": [1, 2, 5]}
    assert equal(merge(model, [node] * 3, spec=spec_of(network), **options).state_dict, node)


@pytest.mark.parametrize("network", NETWORKS)
def test_permuted_copies_merge_to_the_original_function(network: str) -> None:
    model, (node,) = nodes(network, 1)
    spec = spec_of(network)
    copies = [node, *(permutation.apply(spec, permutation.random(spec, SEED(seed)), node) for seed in (1, 2))]
    merged = merge(model, copies, spec=spec, basis=0)
    assert merged.report.share_moved is not None
    assert merged.report.share_moved[0] == 0 < min(merged.report.share_moved[1:])
    wanted = outputs(model, node, CALIBRATION[0])
    torch.testing.assert_close(outputs(model, merged.state_dict, CALIBRATION[0]), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", ["mlp", "batch norm"])
def test_the_order_of_the_nodes_does_not_matter_to_a_bit(network: str, method: str) -> None:
    model, params = nodes(network, 3)
    weights = [1.0, 3.0, 3.0]

    def merged(order: tuple[int, ...]) -> dict[str, Tensor]:
        chosen, share = [params[index] for index in order], [weights[index] for index in order]
        options: dict[str, Any] = {"spec": spec_of(network), "method": method, "calibration": CALIBRATION}
        return merge(model, chosen, weights=share, **options).state_dict

    first = merged((0, 1, 2))
    assert all(equal(first, merged(order)) for order in permutations(range(3)))


@pytest.mark.parametrize("recalibrate", SHORT_NAMES)
@pytest.mark.parametrize("network", ["cnn", "batch norm"])
def test_nor_does_it_matter_to_what_follows_the_average(network: str, recalibrate: str) -> None:
    model, params = nodes(network, 3)
    options: dict[str, Any] = {"spec": spec_of(network), "recalibrate": recalibrate, "calibration": CALIBRATION}
    one = merge(model, params, weights=[1, 3, 3], **options).state_dict
    assert equal(one, merge(model, params[::-1], weights=[3, 3, 1], **options).state_dict)


@pytest.mark.parametrize("recalibrate", ["repair", "refit", "auto"])
@pytest.mark.parametrize("network", ["mlp", "cnn", "layer norm"])
def test_a_node_without_weight_has_no_say_in_what_follows_the_average(network: str, recalibrate: str) -> None:
    model, params = nodes(network, 3)
    options: dict[str, Any] = {"spec": spec_of(network), "recalibrate": recalibrate, "calibration": CALIBRATION}
    alone = merge(model, params, weights=[1, 0, 0], basis=0, **options).state_dict
    assert all(torch.allclose(alone[name], value, rtol=1e-6, atol=1e-7) for name, value in params[0].items())


@pytest.mark.parametrize("basis", [0, 1, 2])
def test_the_basis_changes_the_order_of_units_and_not_the_function(basis: int) -> None:
    model, params = nodes("cnn", 3)
    default = merge(model, params, spec=spec_of("cnn"))
    chosen = merge(model, params, spec=spec_of("cnn"), basis=basis)
    assert chosen.report.basis == basis
    inputs = CALIBRATION[0]
    wanted = outputs(model, default.state_dict, inputs)
    torch.testing.assert_close(outputs(model, chosen.state_dict, inputs), wanted, rtol=1e-4, atol=1e-5)


def test_the_merge_is_the_weighted_mean_of_the_aligned_nodes() -> None:
    model, params = nodes("mlp", 3)
    merged = merge(model, params, weights=[1, 2, 3], spec=spec_of("mlp"), basis=1)
    assert merged.match is not None
    aligned = [permutation.apply(spec_of("mlp"), merged.match.between(1, i), node) for i, node in enumerate(params)]
    wanted = weighted_mean(aligned, [1, 2, 3])
    for name in wanted:
        torch.testing.assert_close(merged.state_dict[name], wanted[name])


def test_the_default_basis_is_the_heaviest_node() -> None:
    model, params = nodes("mlp", 3)
    assert merge(model, params, weights=[1, 5, 2], spec=spec_of("mlp")).report.basis == 1


def test_integer_buffers_keep_their_type_and_take_the_largest_value() -> None:
    model, params = nodes("batch norm", 3)
    counters = [node["norm.num_batches_tracked"] for node in params]
    found = merge(model, params, spec=spec_of("batch norm")).state_dict["norm.num_batches_tracked"]
    assert found.dtype == torch.int64
    assert found == max(counters)


def test_nothing_that_was_given_is_changed() -> None:
    model, params = nodes("batch norm", 2)
    before, kept = copy.deepcopy(model.state_dict()), copy.deepcopy(params)
    model.train()
    merge(model, params, calibration=CALIBRATION, spec=spec_of("batch norm"))
    assert model.training
    assert equal(dict(model.state_dict()), dict(before))
    assert all(equal(a, b) for a, b in zip(params, kept, strict=True))


def test_classes_in_place_of_their_instances_are_named() -> None:
    model = torch.nn.Linear(4, 2)
    node = model.state_dict()
    with pytest.raises(ConfigError, match=r"model is <class .*Linear'>, expected a module such as Net\(\)"):
        merge(torch.nn.Linear, [node, node], example_inputs=torch.zeros(2, 4))  # type: ignore[arg-type]  # on purpose
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


def test_modules_that_ask_for_the_version_of_a_state_dict_load_the_merge() -> None:
    class Versioned(torch.nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest) -> None:  # type: ignore[no-untyped-def]  # torch's
            assert local_metadata.get("version") == 3
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), Versioned(5, 2)).eval()
    found = merge(model, [dict(model.state_dict())] * 2, example_inputs=torch.zeros(2, 4))
    model.load_state_dict(found.state_dict)


def test_the_merge_loads_into_the_model_and_the_spec_is_derived_from_calibration() -> None:
    model, params = nodes("mlp", 2)
    merged = merge(model, params, calibration=[(CALIBRATION[0], torch.zeros(32, dtype=torch.int64))])
    model.load_state_dict(merged.state_dict)
    report = merged.report
    assert report.objectives is not None
    assert report.objectives[1] >= report.objectives[0]
    assert report.recalibration is not None
    assert report.recalibration.method == "repair"
    assert report.recalibration.inputs == 32


def test_a_merge_says_in_a_few_lines_what_it_did() -> None:
    model, params = nodes("mlp", 2)
    merged = merge(model, params, calibration=[CALIBRATION[0]])
    lines = str(merged.report).splitlines()
    assert lines[0].split() == ["networks", "2,", "in", "the", "basis", "of", "number", str(merged.report.basis)]
    assert any(line.startswith("recalibration") and line.endswith("repair, on 32 inputs") for line in lines)
    assert max(map(len, lines)) < 120
    assert str(merged.match).startswith("2 nodes: agreement ")
    assert str(merged) == str(merged.report)


def test_batch_norm_without_calibration_is_noted() -> None:
    model, params = nodes("batch norm", 2)
    nothing, note = merge(model, params, spec=spec_of("batch norm")).report.notes
    assert nothing == "nothing was recalibrated: there are no calibration data"
    assert "BatchNorm statistics" in note
    assert not merge(*nodes("mlp", 2), spec=spec_of("mlp"), calibration=[CALIBRATION[0]]).report.notes


def test_one_network_agrees_with_no_other() -> None:
    model, params = nodes("mlp", 1)
    report = merge(model, params, spec=spec_of("mlp")).report
    assert (report.objectives, report.layers) == (None, {})


def test_an_iterator_gives_the_merge_all_its_batches() -> None:
    model, params = nodes("mlp", 2)
    data = [CALIBRATION[0][:8], CALIBRATION[0][8:]]
    once, often = (merge(model, params, calibration=given) for given in (iter(data), data))
    assert equal(once.state_dict, often.state_dict)


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
        ({"moments": [{}, {}], "calibration": CALIBRATION}, ConfigError, 'moments serve recalibrate="auto"'),
        ({"moments": [{}, {}], "recalibrate": "auto"}, ConfigError, 'moments serve recalibrate="auto"'),
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


def test_repair_is_the_default_with_data_and_asking_for_it_needs_data() -> None:
    model, params = nodes("mlp", 2)
    options: dict[str, Any] = {"spec": spec_of("mlp")}
    assert equal(
        merge(model, params, calibration=CALIBRATION, **options).state_dict,
        merge(model, params, calibration=CALIBRATION, recalibrate="repair", **options).state_dict,
    )
    assert merge(model, params, **options).report.recalibration is None
    for asked in ("repair", Repair()):
        with pytest.raises(CalibrationError, match="needs calibration inputs"):
            merge(model, params, recalibrate=asked, **options)


def test_dicts_are_batches_and_example_inputs() -> None:
    model, params = nodes("mlp", 2)
    plain = merge(model, params, calibration=CALIBRATION).state_dict
    named = [{"input": batch, "label": torch.zeros(len(batch), dtype=torch.long)} for batch in CALIBRATION]
    assert equal(merge(model, params, calibration=named).state_dict, plain)
    foreign = [{"img": batch} for batch in CALIBRATION]
    with pytest.raises(CalibrationError, match=r"\['img'\] are not arguments of Sequential.forward\(input\)"):
        merge(model, params, calibration=foreign)
    assert equal(merge(model, params, calibration=foreign, inputs=("img",)).state_dict, plain)
    alone = merge(model, params, example_inputs={"input": CALIBRATION[0]}).state_dict
    assert equal(alone, merge(model, params, example_inputs=CALIBRATION[0]).state_dict)


def test_a_merge_exports_the_network_once_for_each_kind_of_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    plain = program.export
    monkeypatch.setattr(program, "export", lambda *given: seen.append(1) or plain(*given))
    model, params = nodes("mlp", 2)
    merge(model, params, spec=spec_of("mlp"), calibration=CALIBRATION, method="activations")
    assert len(seen) == 2  # the last batch is smaller
