"""A silo: starts from an initialisation of its own, and from the global model ever after."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from silos.model import digits, net

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    current = int(message.content["config"]["server-round"])
    partition = int(context.node_config["partition-id"])
    folder = Path(str(context.run_config["folder"]))
    (folder / f"training-{partition}-{current}").touch()
    model = net(100 + partition)
    if current > 1:
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data, labels = (each[:1200][partition::3] for each in digits())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(10):
        for batch in torch.arange(len(data)).split(32):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(data[batch]), labels[batch]).backward()
            optimiser.step()
    while (folder / f"hold-{partition}-{current}").exists():
        time.sleep(0.1)  # the test says when training is over
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(data)})}
    return Message(RecordDict(content), reply_to=message)
