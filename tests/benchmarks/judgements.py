"""What the clients' judgement of a candidate is worth: its gain there against its gain on the test images.

    python -m tests.benchmarks.judgements        seeds 10 and 11, which no table shows

The federations are those of the experiment `digits`, where clients judge with a fifth of their 260 images and with a
twentieth. By the gain that the judge compares with its margin, a share of the aggregate's loss, it prints how many
candidates there are, how many of them have a larger loss on the test images than the aggregate, and their gains there.
The margin in `c2m3_fl.merging.evaluate.decide` was chosen by this.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch

from c2m3_fl import C2M3
from c2m3_fl.core.spec import Params
from c2m3_fl.flower.deploying import deployment
from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.judging.judge import judge_candidates
from c2m3_fl.flower.queries.refit import ClientRefit
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.merging.evaluate.decide import DeploymentDecision
from simulations.client_app import build_app
from simulations.data import federated_data
from simulations.design import load_design
from simulations.flower_log import flower_log
from simulations.settings import Settings
from simulations.simulated_server import SimulatedServer
from simulations.start import start_model
from simulations.strategies import fedavg
from simulations.training import log_probabilities, score
from simulations.trial import RememberingTrainer

EDGES = (-float("inf"), 0.0, 0.005, 0.01, 0.02, 0.05, float("inf"))
HOLDOUTS = (0.2, 0.05)


def judged(settings: Settings) -> Iterator[tuple[float, float, float]]:
    """Of every candidate but the aggregate: its robust gain and the gain on the test images, as shares of the loss; the
    gain in accuracy there.
    """
    data, app = federated_data(settings), build_app(RememberingTrainer())
    for recalibrate in (None, ClientRefit()):
        seen: list[tuple[Mapping[str, Params], DeploymentDecision]] = []

        def keeping(*args: Any, seen: list[Any] = seen, **options: Any) -> DeploymentDecision:
            seen.append((args[3], judge_candidates(*args, **options)))
            return seen[-1][1]  # type: ignore[no-any-return]  # as above

        model = start_model(settings)
        server = SimulatedServer(model, data.calibration, len(data.parts))
        grid = SerialGrid(app, settings.clients, run_config=settings.to_run_config())
        with flower_log(logging.ERROR), patch.object(deployment, "judge_candidates", keeping):
            strategy = C2M3(fedavg(server), model=model, calibration=data.calibration, recalibrate=recalibrate)
            strategy.start(grid, from_params(model.state_dict()), settings.rounds)
        images = data.held_out
        for candidates, verdict in seen:
            known = {
                name: score(log_probabilities(model, params, images.inputs), images.labels)
                for name, params in candidates.items()
            }
            aggregate, *others = verdict.candidates
            before = known[aggregate.name]
            for each in others:
                if each.robust_gain is not None and aggregate.loss:
                    after = known[each.name]
                    yield (
                        each.robust_gain / aggregate.loss,
                        1 - after.loss / before.loss,
                        after.accuracy - before.accuracy,
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for holdout in HOLDOUTS:
        found: list[tuple[float, float, float]] = []
        for seed in options.seeds:
            for cell in load_design("digits").cells:
                found += judged(replace(cell.settings, seed=seed, holdout=holdout))
        print(f"\nheld out: {holdout}\n")
        print("| gain at the clients | candidates | larger test loss | test gain, mean | accuracy, mean | least |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for low, high in pairwise(EDGES):
            gains = [(loss, accuracy) for gain, loss, accuracy in found if low < gain <= high]
            if gains:
                loss, accuracy = zip(*gains, strict=True)
                worse = sum(gain < 0 for gain in loss)
                counts = f"{len(gains)} | {worse} | {fmean(loss):.3f} | {fmean(accuracy):.3f} | {min(accuracy):.3f}"
                print(f"| {low:g} to {high:g} | {counts} |", flush=True)


if __name__ == "__main__":
    main()
