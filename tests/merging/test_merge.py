"""What a merge keeps, and what it says of itself."""

from __future__ import annotations

import copy
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.errors import CalibrationError
from c2m3_fl.merging.align.methods import METHODS
from c2m3_fl.merging.merge import merge
from c2m3_fl.merging.recalibrate.repair import Repair
from c2m3_fl.merging.recalibrate.short_names import SHORT_NAMES
from c2m3_fl.network import program
from tests.merging.networks import CALIBRATION, NETWORKS, SEED, equal, nodes, outputs, spec_of


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
@pytest.mark.parametrize("network", ["mlp", pytest.param("batch norm", marks=pytest.mark.slow)])
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
    assert "tensor(" not in repr(merged)


def test_tensors_that_are_zero_have_no_angle_and_do_not_hide_those_that_have_one() -> None:
    model, params = nodes("mlp", 2)
    biases = [name for name in params[0] if name.endswith("bias")]
    zeroed = [{name: value * (name not in biases) for name, value in each.items()} for each in params]
    lines = str(merge(model, zeroed, spec=spec_of("mlp"))).splitlines()
    angles = [line.split()[1] for line in lines if line.startswith("cosine ")]
    assert sorted(angles) == sorted(name for name in params[0] if name not in biases)


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
