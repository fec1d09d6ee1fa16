"""The client: trains the network that it receives, or its own in its first round, on its share of the images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from c2m3_fl.core.spec import Params
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.queries.moments import answer_statistics
from simulations.data import Images, derived_seed, federated_data
from simulations.models import build_model
from simulations.partition_grid import PARTITION, play_partition
from simulations.peers import FISHER, diagonal_fisher
from simulations.settings import Settings
from simulations.training import default_device, log_probabilities, score, train

_INITIALISATION, _BATCHES = 2, 3  # independent streams derived from the seed; the data use 0 and 1
_BATCH = 250  # images that a client measures at once
_INFORMATIVE = 256  # images of which a client computes its Fisher information


@dataclass(frozen=True, eq=False)
class Assignment:
    """One client's training in one round.

    Attributes
    ----------
    settings : Settings
        The federation.
    client : int
        Number of the client.
    round : int
        From 1.
    params : mapping of str to Tensor
        Initial state dict of the training, in the types of the network.
    proximal : float
        Strength of FedProx's proximal term, which penalises the distance from `params`.
    """

    settings: Settings
    client: int
    round: int
    params: Params
    proximal: float


Trained = tuple[dict[str, Tensor], float]  # the state dict and the last epoch's loss
Trainer = Callable[[Assignment], Trained]


def train_locally(assignment: Assignment, device: torch.device | None = None) -> Trained:
    """Train for the local epochs; all randomness follows from the seed, the client and the round.

    Parameters
    ----------
    assignment : Assignment
        What to train.
    device : torch.device, optional
        Where; by default `default_device`.
    """
    settings, client = assignment.settings, assignment.client
    model = _network(settings).to(device or default_device())
    model.load_state_dict(assignment.params)
    images = federated_data(settings).training_share(client)
    seed = derived_seed(settings.seed, _BATCHES, client, assignment.round)
    loss = train(model, images, settings, seed, proximal=assignment.proximal)
    return {name: value.cpu() for name, value in model.state_dict().items()}, loss


def build_app(trainer: Trainer = train_locally, device: torch.device | None = None) -> ClientApp:
    """A client app whose clients train, evaluate and answer the server's queries for statistics.

    Parameters
    ----------
    trainer : callable
        Does the training; another one may cache results.
    device : torch.device, optional
        Where clients evaluate; by default `default_device`.
    """
    app = ClientApp(mods=[play_partition])
    answer_statistics(app, model=_architecture, data=_own_data)

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        """Reply with the state dict, the number of images and the last loss."""
        settings, client = _who(context)
        arrays, config = _read(message)
        assignment = Assignment(
            settings,
            client,
            round=_integer(config["server-round"]),
            params=_start(settings, client, _integer(config["server-round"]), arrays),
            proximal=float(str(config.get("proximal-mu", 0.0))),
        )
        params, loss = trainer(assignment)
        count = len(federated_data(settings).training_share(client))
        metrics = MetricRecord({"num-examples": count, "train-loss": loss})
        content = RecordDict({"arrays": from_params(params), "metrics": metrics})
        if config.get(FISHER):
            images = federated_data(settings).training_share(client)[:_INFORMATIVE].inputs
            content[FISHER] = from_params(diagonal_fisher(_network(settings), params, images))
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        """Reply with loss and accuracy of the received network on images that this client does not train on."""
        settings, client = _who(context)
        arrays, _ = _read(message)
        images: Images = federated_data(settings).evaluation_share(client)
        model = _network(settings).to(device or default_device())
        found = score(log_probabilities(model, to_params(arrays), images.inputs), images.labels)
        metrics = MetricRecord({"num-examples": len(images), "loss": found.loss, "accuracy": found.accuracy})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def own_start(settings: Settings, client: int) -> Params:
    """A client's own initialisation, which depends on the seed and the client alone."""
    return _network(settings, derived_seed(settings.seed, _INITIALISATION, client)).state_dict()


def _start(settings: Settings, client: int, current: int, arrays: ArrayRecord) -> Params:
    """Initial parameters: those received, or the client's own.

    Its own are those of round 1 with independent initialisations, and those of a late client's first round.
    """
    first = settings.joins_in(client)
    if current == first and (settings.initialisation == "independent" or first > 1):
        return own_start(settings, client)
    model = _network(settings)
    model.load_state_dict(to_params(arrays))
    return model.state_dict()


def _network(settings: Settings, seed: int = 0) -> nn.Module:
    data = federated_data(settings)
    return build_model(settings, data.shape, data.classes, seed)


def _architecture(context: Context) -> nn.Module:
    return _network(_who(context)[0])


def _own_data(context: Context) -> list[tuple[Tensor, Tensor]]:
    settings, client = _who(context)
    images = federated_data(settings).training_share(client)
    return list(zip(torch.split(images.inputs, _BATCH), torch.split(images.labels, _BATCH), strict=True))


def _who(context: Context) -> tuple[Settings, int]:
    return Settings.from_run_config(context.run_config), _integer(context.node_config[PARTITION])


def _read(message: Message) -> tuple[ArrayRecord, ConfigRecord]:
    config, arrays = message.content["config"], message.content["arrays"]
    if not isinstance(config, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise TypeError("expected a ConfigRecord 'config' and an ArrayRecord 'arrays'")
    return arrays, config


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"expected an integer, got {value!r}")
    return value


app = build_app()
