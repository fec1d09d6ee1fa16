"""The client: trains the network it is sent, or in round 1 its own, on its share of the images."""

from __future__ import annotations

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from c2m3_fl.flower.records import from_params, to_params
from simulations.data import derived_seed, federated_data
from simulations.grid import PARTITION
from simulations.models import build_model
from simulations.settings import Settings
from simulations.training import default_device, train

app = ClientApp()

_INITIALISATION, _BATCHES = 2, 3  # which of a seed's independent streams; the data use 0 and 1


@app.train()
def fit(message: Message, context: Context) -> Message:
    """Train for the local epochs; the reply carries the state dict, the number of images and the last loss.

    With independent initialisations a client ignores what it is sent in round 1. All that is random is
    decided by the seed, the client and the round.
    """
    settings = Settings.from_run_config(context.run_config)
    config = message.content["config"]
    arrays = message.content["arrays"]
    if not isinstance(config, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise TypeError("expected a ConfigRecord 'config' and an ArrayRecord 'arrays'")
    client = _integer(config.get(PARTITION, context.node_config.get("partition-id", 0)))
    current = _integer(config["server-round"])

    data = federated_data(settings)
    images = data.share(client)
    own = derived_seed(settings.seed, _INITIALISATION, client)
    model = build_model(settings, data.shape, data.classes, own).to(default_device())
    if settings.initialisation == "shared" or current > 1:
        model.load_state_dict(to_params(arrays))
    loss = train(model, images, settings, derived_seed(settings.seed, _BATCHES, client, current))

    metrics = MetricRecord({"num-examples": len(images), "train-loss": loss})
    return Message(RecordDict({"arrays": from_params(model.state_dict()), "metrics": metrics}), reply_to=message)


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"expected an integer, got {value!r}")
    return value
