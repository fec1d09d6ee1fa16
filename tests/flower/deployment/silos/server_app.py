"""The server: C2M3, in two lines that survive its death."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.flower.resuming.resumable import Resumable
from c2m3_fl.flower.strategy import C2M3
from silos.model import digits, net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    torch.set_num_threads(1)
    folder = Path(str(context.run_config["folder"]))
    data, labels = (each[1200:] for each in digits())
    while len(list(grid.get_node_ids())) < int(context.run_config["nodes"]):
        time.sleep(0.5)

    def evaluate(current: int, arrays: ArrayRecord) -> MetricRecord:
        model = net()
        model.load_state_dict(arrays.to_torch_state_dict())
        with (folder / "evaluations").open("a") as file:
            file.write(f"{os.getpid()} {current}\n")
        (folder / f"evaluated-{current}").touch()
        return MetricRecord({"accuracy": float((model(data).argmax(1) == labels).float().mean())})

    aligned = C2M3(FedAvg(fraction_evaluate=0.0), model=net(), calibration=[data[:200]])
    strategy = Resumable(aligned, folder / "checkpoints")
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(net().state_dict()),
        num_rounds=int(context.run_config["rounds"]),
        evaluate_fn=evaluate,
    )
    report = {
        "replies": {current: each["c2m3-replies"] for current, each in result.train_metrics_clientapp.items()},
        "dropped": {current: each["c2m3-dropped"] for current, each in result.train_metrics_clientapp.items()},
        "accuracy": {current: each["accuracy"] for current, each in result.evaluate_metrics_serverapp.items()},
    }
    (folder / "result.json").write_text(json.dumps(report))
