"""A strategy that computes on another device sends out what it would have sent from the CPU, and from there."""

from __future__ import annotations

import contextlib

import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.aligning import aligner
from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import (
    EXAMPLE,
    aggregate,
    answering,
    calibration,
    clients,
    digits_app,
    good,
    mlp,
    reply,
    same,
    shuffled,
)


def close(found, expected, tolerance=1e-5):
    return all(
        torch.allclose(value, expected.to_torch_state_dict()[name], rtol=0, atol=tolerance * float(value.abs().max()))
        for name, value in found.to_torch_state_dict().items()
    )


def moved():
    """Replies whose units are in different orders."""
    spec = C2M3(model=mlp(), example_inputs=EXAMPLE).setup.spec
    return [reply(node, shuffled(spec, params, node)) for node, params in enumerate(clients(4, independent=False))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"memory_limit": 1}, {"alignment": "separate"}], ids=["joint", "batches", "separate"]
)
def test_replies_are_aligned_as_on_the_cpu(options, device):
    expected, _ = aggregate(moved(), C2M3(model=mlp(), example_inputs=EXAMPLE, device="cpu", **options))
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE, device=device, **options)
    found, metrics = aggregate(moved(), strategy)
    assert close(found, expected)
    assert "c2m3-on-cpu" not in metrics


@pytest.mark.slow
def test_still_replies_are_averaged_bit_for_bit(device):
    expected, _ = aggregate(good(), C2M3(model=mlp(), example_inputs=EXAMPLE, device="cpu"))
    found, _ = aggregate(good(), C2M3(model=mlp(), example_inputs=EXAMPLE, device=device))
    assert same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("recalibrate", ["repair", "refit", None])
def test_a_federation_deploys_what_it_deploys_on_the_cpu(recalibrate, device):
    def run(place):
        options = {"calibration": calibration()[:2], "recalibrate": recalibrate, "device": place}
        strategy = C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), **options)
        app = answering(app=digits_app(independent=True, epochs=1))
        result = strategy.start(
            grid=SerialGrid(app, 2), initial_arrays=from_params(mlp().state_dict()), num_rounds=1, timeout=1
        )
        return result.arrays

    assert close(run(device), run("cpu"), 1e-4)


@pytest.mark.slow
def test_a_model_on_the_device_is_one_on_the_cpu_to_clients(device):
    expected, _ = aggregate(moved(), C2M3(model=mlp(), example_inputs=EXAMPLE, device="cpu"))
    strategy = C2M3(model=mlp().to(device), example_inputs=EXAMPLE, device=device)
    found, _ = aggregate(moved(), strategy, sent=mlp().state_dict())
    assert close(found, expected)


def test_no_room_on_the_device_is_a_match_on_the_cpu(device, monkeypatch):
    expected, _ = aggregate(good(), C2M3(model=mlp(), example_inputs=EXAMPLE, device="cpu"))
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE, device=device)
    moves = aligner.to_device

    def scarce(params, place):
        if place.type == device.type:
            raise torch.OutOfMemoryError("out of memory")
        return moves(params, place)

    monkeypatch.setattr(aligner, "to_device", scarce)
    found, metrics = aggregate(good(), strategy)
    assert same(found, expected)
    assert metrics["c2m3-on-cpu"] == 1


def test_what_does_not_fit_into_the_memory_of_cuda_is_matched_on_the_cpu(caplog):
    """The error that CUDA itself raises."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    strategy, replies = C2M3(model=mlp(), example_inputs=EXAMPLE, device="cuda"), moved()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)  # nothing but what is left of memory that is in use
    taken = []
    try:
        for size in (1 << 20, 1 << 14, 512):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        _, metrics = aggregate(replies, strategy)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert metrics["c2m3-on-cpu"] == 1
    assert any("out of memory, going on on the CPU" in text for text in caplog.messages)


def test_a_device_that_is_not_there_is_refused():
    for device in ("cuda:77", "gpu", "meta"):
        with pytest.raises(ConfigError, match=f"device is '{device}', which cannot be used here"):
            C2M3(model=mlp(), example_inputs=EXAMPLE, device=device)


def test_permutations_are_remembered_on_the_cpu(device):
    strategy = C2M3(model=mlp(), example_inputs=EXAMPLE, device=device)
    aggregate(moved(), strategy)
    known = [strategy.setup.aligner.memory.recall(node) for node in range(4)]
    assert {index.device.type for perm in known if perm for index in perm.values()} == {"cpu"}
