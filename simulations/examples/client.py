"""A Flower client that trains its own initial weights in the first round, and the global model afterwards."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from simulations.examples.digits import Net, train

app = ClientApp()


@app.train()
def fit(message: Message, context: Context) -> Message:
    """Train on this client's share of the images; reply with the weights and the number of images."""
    part, parts = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    net = Net(seed=1 + part)
    if message.content.config_records["config"]["server-round"] != 1:
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    images = train(net, part, parts)
    metrics = MetricRecord({"num-examples": images})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)
