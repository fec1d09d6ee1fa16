"""A small federation on scikit-learn's digits, and replies made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from c2m3_fl.core import permutation
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.private import assign_id
from c2m3_fl.flower.queries.moments import answer_statistics
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3

torch.set_num_threads(1)

_TRAINING = 1200  # of 1,797 digits; the rest is the test set


@cache
def digits() -> tuple[Tensor, Tensor]:
    data, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data / 16.0, dtype=torch.float32)[order], torch.tensor(labels)[order]


def calibration() -> list[Tensor]:
    return list(digits()[0][:400].split(100))


def mlp(seed: int = 0, width: int = 32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def normed(seed: int = 0, width: int = 16) -> nn.Module:
    """With BatchNorm, and so with an integer buffer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))


EXAMPLE = torch.zeros(2, 64)


def train(model: nn.Module, data: Tensor, labels: Tensor, *, epochs: int, seed: int, rate: float = 0.1) -> float:
    """SGD with momentum on batches of 32; the last loss."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    loss = torch.zeros(())
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data), generator=generator).split(32):
            optimiser.zero_grad()
            loss = functional.cross_entropy(model(data[batch]), labels[batch])
            loss.backward()
            optimiser.step()
    return float(loss.detach())


def accuracy(make: Callable[[], nn.Module], arrays: ArrayRecord) -> float:
    model = make()
    model.load_state_dict(arrays.to_torch_state_dict())
    model.eval()
    data, labels = digits()
    with torch.no_grad():
        return float((model(data[_TRAINING:]).argmax(1) == labels[_TRAINING:]).float().mean())


def digits_app(
    make: Callable[[int], nn.Module] = mlp,
    *,
    independent: bool = False,
    epochs: int = 2,
    rate: float = 0.1,
    evaluates: str = "accuracy",
) -> ClientApp:
    """Clients that train on their share of the digits.

    With `independent` they start, in round one, from an initialisation of their own. What a client does depends
    on its partition and the round, on nothing else. `evaluates` names their metric: accuracy on the test set, "loss"
    on what they train on, or "" for clients without an evaluation.
    """
    app = ClientApp()

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        current = int(message.content["config"]["server-round"])
        partition, count = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
        model = make(1000 + partition)
        if not (independent and current == 1):
            model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        data, labels = (each[:_TRAINING][partition::count] for each in digits())
        loss = train(model, data, labels, epochs=epochs, seed=1000 * current + partition, rate=rate)
        metrics = MetricRecord({"num-examples": len(data), "train_loss": loss})
        return Message(RecordDict({"arrays": from_params(model.state_dict()), "metrics": metrics}), reply_to=message)

    def evaluate(message: Message, context: Context) -> Message:
        found = (
            accuracy(make, message.content["arrays"]) if evaluates == "accuracy" else own_loss(make, message, context)
        )
        metrics = MetricRecord({"num-examples": 1, evaluates: found})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    if evaluates:
        app.evaluate()(evaluate)
    return app


def own_loss(make: Callable[[int], nn.Module], message: Message, context: Context) -> float:
    """The loss of a model that was sent on what the client trains on."""
    partition, count = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    model = make(0)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    model.eval()
    data, labels = (each[:_TRAINING][partition::count] for each in digits())
    with torch.no_grad():
        return float(functional.cross_entropy(model(data), labels))


def reply(
    node: int, params: Params, *, examples: float | list[float] | None = 10, metrics: dict[str, float] | None = None
) -> Message:
    """A training reply as Flower delivers it; `examples` None leaves the weight out."""
    record = MetricRecord({**({} if examples is None else {"num-examples": examples}), **(metrics or {})})
    return answer(node, RecordDict({"arrays": from_params(params), "metrics": record}))


def answer(node: int, content: RecordDict | Error) -> Message:
    """A reply of any content, or an error."""
    SerialGrid(ClientApp(), 1)  # gives the process the identity without which no message can be made
    instruction = Message(RecordDict(), dst_node_id=node, message_type="train")
    assign_id(instruction, f"to-{node}")
    return Message(content, reply_to=instruction)


def with_array(message: Message, name: str, array: Array) -> Message:
    """The same reply with one array replaced or added."""
    message.content["arrays"][name] = array
    return message


def send(strategy: Strategy, params: Params, *, nodes: int = 2, round_number: int = 1) -> list[Message]:
    """Let a strategy send out a model; the messages."""
    grid = SerialGrid(ClientApp(), nodes)
    return list(strategy.configure_train(round_number, from_params(params), ConfigRecord(), grid))


def clients(count: int, *, independent: bool = True, epochs: int = 5) -> list[dict[str, Tensor]]:
    """State dicts trained on a share of the digits each."""
    return [dict(each) for each in _clients(count, independent, epochs)]


@cache
def _clients(count: int, independent: bool, epochs: int) -> Sequence[Params]:
    found = []
    for index in range(count):
        model = mlp(index + 1 if independent else 0)
        data, labels = (each[:_TRAINING][index::count] for each in digits())
        train(model, data, labels, epochs=epochs, seed=index, rate=0.1 if independent else 0.01)
        found.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    return found


def shuffled(spec: PermutationSpec, params: Params, seed: int) -> dict[str, Tensor]:
    """The same function, its units in another order."""
    return permutation.apply(spec, permutation.random(spec, torch.Generator().manual_seed(seed)), params)


def same(left: ArrayRecord, right: ArrayRecord) -> bool:
    """Whether keys, order, element types and every bit agree."""
    return list(left) == list(right) and all(
        (left[name].dtype, left[name].data) == (right[name].dtype, right[name].data) for name in left
    )


@cache
def patient() -> C2M3:
    """One strategy for many rounds: it remembers nothing, is traced once, and its metrics hold all numbers."""
    return C2M3(model=mlp(), example_inputs=EXAMPLE, memory=0, diagnostics=True)


def good(count: int = 3) -> list[Message]:
    """Replies with nothing wrong."""
    return [reply(node, params) for node, params in enumerate(clients(count))]


def aggregate(
    messages: list[Message], strategy: Strategy | None = None, sent: Params | None = None
) -> tuple[ArrayRecord, MetricRecord]:
    """One round of a strategy that has sent out a model."""
    strategy = strategy or patient()
    send(strategy, sent or mlp().state_dict())
    return strategy.aggregate_train(1, messages)


def share(context: Context) -> list[tuple[Tensor, Tensor]]:
    """A client's own calibration data: unequal shares, in batches of unequal size, labels and all."""
    partition = int(context.node_config["partition-id"])
    data, labels = (each[partition * 100 : partition * 100 + 60 + 20 * partition] for each in digits())
    return list(zip(data.split(32), labels.split(32), strict=True))


def pooled(count: int = 3) -> list[Tensor]:
    """The data of several clients, in one place."""
    data = digits()[0]
    return [data[partition * 100 : partition * 100 + 60 + 20 * partition] for partition in range(count)]


def answering(
    make: Callable[[], nn.Module] = mlp, app: ClientApp | None = None, *, first_layer: bool = False
) -> ClientApp:
    """A client app that answers the server's queries."""
    app = app or ClientApp()
    answer_statistics(app, model=lambda context: make(), data=share, first_layer=first_layer)
    return app
