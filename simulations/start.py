"""What a run starts from: the server's network, and the generator by which clients are sampled."""

from __future__ import annotations

import random

from torch import nn

from simulations.data import derived_seed, federated_data
from simulations.models import build_model
from simulations.settings import Settings

_SERVER_MODEL, _SAMPLING = 4, 5  # streams, derived from the seed: the server's model, the clients of a round


def start_model(settings: Settings) -> nn.Module:
    """The network that a server starts from, by the seed of the settings."""
    data = federated_data(settings)
    return build_model(settings, data.shape, data.classes, derived_seed(settings.seed, _SERVER_MODEL))


def seed_sampling(settings: Settings) -> None:
    """Seed Python's global generator, from which Flower's strategies sample the clients of a round."""
    random.seed(derived_seed(settings.seed, _SAMPLING))
