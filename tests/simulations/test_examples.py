"""The examples that the pages quote."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Context, RecordDict
from pytorchexample import server_app

from c2m3_fl import permutation_spec
from c2m3_fl.errors import TraceError
from c2m3_fl.flower import SerialGrid
from simulations.engine import flower_engine
from simulations.examples import client, merge_two, own_network, quickstart_runs, resume, server
from simulations.examples.digits import calibration


def test_a_merge_of_two_networks_beats_their_mean():
    found = merge_two.main()
    assert found["merged"] > max(found["mean"] + 0.1, found["first"])


def test_a_network_that_cannot_be_traced_is_merged_by_a_spec_by_hand():
    with pytest.raises(TraceError):
        permutation_spec(own_network.Branching(), calibration()[0])
    found = own_network.main()
    assert found["error of the spec"] < 1e-9
    assert found["merged"] > min(found["first"], found["second"])


def test_the_server_aligns_clients_of_independent_initialisations():
    result = server.federate(SerialGrid(client.app, 5), rounds=2)
    scores = [metrics["accuracy"] for _, metrics in sorted(result.evaluate_metrics_serverapp.items())]
    assert scores[1] > 0.75, "after one round the mean of five unaligned networks is near chance"
    assert scores[2] > 0.9


def test_the_server_is_a_server_app():
    server.app(SerialGrid(client.app, 5), Context(1, 0, {}, RecordDict(), {}))


def test_a_resumed_federation_ends_where_an_undisturbed_one_does(tmp_path, monkeypatch):
    whole = resume.federate(SerialGrid(client.app, 3), tmp_path / "whole", rounds=3)

    def dies(current, arrays):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume, "evaluate", lambda current, arrays: dies(current, arrays) if current == 2 else None)
        with pytest.raises(KeyboardInterrupt):
            resume.federate(SerialGrid(client.app, 3), tmp_path / "parts", rounds=3)
    resumed = resume.federate(SerialGrid(client.app, 3), tmp_path / "parts", rounds=3)
    assert list(resumed.evaluate_metrics_serverapp) == [3]
    for name, value in whole.arrays.to_torch_state_dict().items():
        assert torch.equal(resumed.arrays.to_torch_state_dict()[name], value), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_language_models_of_independent_initialisations_are_aligned():
    pytest.importorskip("peft", reason="installed by the extra dev alone")
    from simulations.examples import language

    found = language.main()
    assert found["llama, C2M3"][0] < found["llama, FedAvg"][0] - 0.1
    assert found["bert with lora, C2M3"][-1] < 0.693, "the loss of a guess between two classes"


def test_every_strategy_of_the_quickstart_is_in_its_table():
    assert set(quickstart_runs.STRATEGIES) == set(server_app.STRATEGIES)


@pytest.mark.data
@pytest.mark.process
@pytest.mark.timeout(900)
def test_the_quickstart_runs_on_flowers_engine_with_every_strategy():
    with flower_engine() as engine:
        for strategy in quickstart_runs.STRATEGIES:
            rounds = quickstart_runs.run(engine, strategy=strategy, num_server_rounds=2, images=4000)
            assert list(rounds) == ["0", "1", "2"]
            assert all(0 < metrics["accuracy"] < 1 and metrics["loss"] > 0 for metrics in rounds.values())
