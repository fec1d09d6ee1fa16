"""Clients on digits whose networks differ in width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from c2m3_fl.flower import C2M3, answer_width
from c2m3_fl.flower.incoming.records import from_params
from tests.flower.federation import EXAMPLE, accuracy, digits, mlp, train

WIDTHS = (32, 16, 8)


def sized_app(widths: Sequence[int], *, tells: bool = True, independent: bool = False, epochs: int = 2) -> ClientApp:
    """Clients whose widths go by their partition; what they are sent must fit, but in round one if `independent`."""
    app = ClientApp()

    def own(context: Context, seed: int = 0) -> nn.Module:
        return mlp(seed, widths[int(context.node_config["partition-id"])])

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        partition, count = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
        current = int(message.content["config"]["server-round"])
        model = own(context, 1000 + partition)
        if not (independent and current == 1):
            model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        data, labels = (each[:1200][partition::count] for each in digits())
        train(model, data, labels, epochs=epochs, seed=partition, rate=0.05)
        metrics = MetricRecord({"num-examples": len(data)})
        return Message(RecordDict({"arrays": from_params(model.state_dict()), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        found = accuracy(lambda: own(context), message.content["arrays"])
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "accuracy": found})}), reply_to=message)

    if tells:
        answer_width(app, model=own)
    return app


def sized(strategy: Any = None, **options: Any) -> C2M3:
    """The strategy for clients of all widths."""
    given = {"example_inputs": EXAMPLE} if "calibration" not in options else {}
    return C2M3(strategy, model=mlp(), sizes=[mlp(0, width) for width in WIDTHS[1:]], **given, **options)


def shapes(arrays: ArrayRecord) -> list[tuple[int, ...]]:
    return [tuple(array.shape) for array in arrays.values()]


def narrow(width: int, seed: int) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in mlp(seed, width).state_dict().items()}
