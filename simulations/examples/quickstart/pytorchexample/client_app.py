"""The quickstart's client: trains and evaluates on its share of the images."""

from __future__ import annotations

from typing import cast

import torch
from datasets import Dataset
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from c2m3_fl.flower import answer_statistics
from pytorchexample.data import loader, share
from pytorchexample.task import Net, test, train

app = ClientApp()
answer_statistics(app, model=lambda context: Net(), data=lambda context: loader(own(context)[0], 256))


@app.train()
def fit(message: Message, context: Context) -> Message:
    """Train the global model on this client's images."""
    config, (rows, _) = context.run_config, own(context)
    current = cast("int", message.content.config_records["config"]["server-round"])
    torch.manual_seed(hash((int(config["seed"]), current, int(context.node_config["partition-id"]))))
    net, batches = received(message), loader(rows, int(config["batch-size"]), shuffle=True)
    loss = train(net, batches, int(config["local-epochs"]), float(config["learning-rate"]))
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(rows)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on the images that this client does not train on."""
    _, rows = own(context)
    loss, accuracy = test(received(message), loader(rows, 500))
    metrics = MetricRecord({"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(rows)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def own(context: Context) -> tuple[Dataset, Dataset]:
    """The images of this client, for training and for evaluation."""
    node = context.node_config
    return share(int(node["partition-id"]), int(node["num-partitions"]), context.run_config)


def received(message: Message) -> Net:
    """The network with the arrays of a message."""
    net = Net()
    net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    return net
