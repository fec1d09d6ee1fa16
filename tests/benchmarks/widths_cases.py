"""The clients of the benchmark of different widths: two of every width, each trained from its own initialisation.

Trained clients are kept in a cache folder, so that a measurement that was cut short goes on with them.
"""

from __future__ import annotations

import hashlib
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from c2m3_fl.core.averaging import normalise_weights
from c2m3_fl.core.state_dicts import to_device
from c2m3_fl.merging.align.base import Method
from c2m3_fl.merging.merge_widths import merge_widths
from c2m3_fl.merging.recalibrate.short_names import Recalibration
from c2m3_fl.merging.widths.networks import Widths
from simulations.data import FederatedData, Images, derived_seed, federated_data
from simulations.distillation import distil_towards
from simulations.models import build_model
from simulations.settings import Settings
from simulations.sources import Source, open_source
from simulations.training import train
from tests.benchmarks.merging_cases import CACHE, accuracy, probabilities

WIDTHS = {"½": "32,32", "1": "64,64", "2": "128,128"}
SCALES = {"½": 0.5, "1": 1.0, "2": 2.0}  # of networks other than MLPs
CLIENTS = [width for width in WIDTHS for _ in range(2)]
SETTINGS = Settings(
    data="digits",
    model="mlp",
    clients=len(CLIENTS),
    calibration_size=300,
    batch_size=16,
    local_epochs=20,
    optimiser="adam",
    learning_rate=1e-3,
)
CIFAR = replace(
    SETTINGS, data="cifar10", model="cnn", train_size=24_000, batch_size=64, local_epochs=10, calibration_size=1000
)
CASES = {
    "digits": SETTINGS,
    "mnist": replace(SETTINGS, data="mnist", train_size=6000, test_size=2000, batch_size=32),
    "cifar10": CIFAR,
    "resnet20": replace(CIFAR, model="resnet20-bn", local_epochs=20),
}
TITLES = {"digits": "digits", "mnist": "MNIST", "cifar10": "CIFAR-10, CNN", "resnet20": "CIFAR-10, ResNet20"}
PARTITIONS: dict[str, dict[str, Any]] = {
    "IID": {"partition": "iid"},
    "Dirichlet .3": {"partition": "dirichlet", "alpha": 0.3},
}
_STEPS = 1000  # of distillation


def of_width(settings: Settings, name: str) -> Settings:
    """The same settings with the network of one width."""
    return replace(settings, hidden_widths=WIDTHS[name], width=SCALES[name] if settings.model != "mlp" else 1.0)


@dataclass(frozen=True, eq=False)
class Trained:
    """Clients of every width.

    Attributes
    ----------
    models : list of nn.Module
        The network of each client; clients of one width share theirs.
    nodes : list of dict
        Their state dicts, on the CPU.
    weights : list of float
        Numbers of training examples.
    data : FederatedData
        All of the data.
    test : Images
        What accuracies are measured on, on the device.
    device : torch.device
        Where networks are trained and evaluated.
    """

    models: list[nn.Module]
    nodes: list[dict[str, Tensor]]
    weights: list[float]
    data: FederatedData
    test: Images
    device: torch.device

    @classmethod
    def of(cls, settings: Settings, device: torch.device) -> Trained:
        """Train every client on its own images, from its own initialisation.

        Parameters
        ----------
        settings : Settings
            Data, partition, training and seed.
        device : torch.device
            Where to train and evaluate.
        """
        data = replace(federated_data(settings), train=_decoded(settings.data, "train"))
        kinds = {
            name: build_model(of_width(settings, name), data.shape, data.classes, seed=0).eval() for name in WIDTHS
        }
        nodes = [_node(of_width(settings, name), data, index, device) for index, name in enumerate(CLIENTS)]
        test = Images(data.held_out.inputs.to(device), data.held_out.labels.to(device))
        weights = [float(len(part)) for part in data.parts]
        return cls([kinds[name] for name in CLIENTS], nodes, weights, data, test, device)

    def network(self, client: int) -> nn.Module:
        """The network of a client, on the device."""
        return deepcopy(self.models[client]).to(self.device)

    def accuracy(self, client: int, params: dict[str, Tensor]) -> float:
        """Test accuracy of the network of a client's width with these params."""
        return accuracy(self.network(client), params, self.test)

    def votes(self, inputs: Tensor) -> Tensor:
        """Class probabilities of the clients' ensemble, weighted by numbers of examples."""
        share = normalise_weights(self.weights, len(self.nodes)).tolist()
        votes = [
            part * probabilities(self.network(client), node, inputs)
            for client, (part, node) in enumerate(zip(share, self.nodes, strict=True))
        ]
        return torch.stack(votes).sum(0)

    def distilled(self) -> float:
        """Test accuracy of the client of the largest width with most examples, trained towards the ensemble."""
        inputs = torch.cat(self.data.calibration).to(self.device)
        largest = [client for client, name in enumerate(CLIENTS) if name == CLIENTS[-1]]
        start = self.nodes[max(largest, key=self.weights.__getitem__)]
        student = distil_towards(self.network(-1), start, self.votes(inputs), inputs, steps=_STEPS)
        return self.accuracy(-1, student)

    def widths(self) -> Widths:
        """The networks, traced once for all merges."""
        return Widths.of(self.models, None, self.data.calibration, example_inputs=None, inputs=None, outputs=None)

    def merged(
        self,
        widths: Widths,
        width: int | None,
        recalibration: Recalibration | None,
        method: Method,
        device: torch.device,
    ) -> float:
        """Test accuracy of a merge with the width of a client, or the largest.

        Parameters
        ----------
        widths : Widths
            From `widths`.
        width : int, optional
            The number of a client; None for the largest width.
        recalibration : Recalibration, optional
            What to do with the calibration data.
        method : Method
            How the nodes are aligned.
        device : torch.device
            Where to merge.
        """
        if width is not None:
            widths = replace(widths, result=widths.nodes[width], node=width)
        options = {"weights": self.weights, "recalibration": recalibration, "method": method, "basis": None}
        done = merge_widths(widths, self.nodes, **options, device=device)  # type: ignore[arg-type]  # as a dict
        return self.accuracy(-1 if width is None else width, done.state_dict)


@lru_cache(maxsize=1)
def _decoded(name: str, split: str) -> Source:
    """A source whose images are decoded once, for all cases and seeds."""
    source = open_source(name, split)
    images = source.raw(np.arange(len(source.labels)))
    return replace(source, raw=lambda rows: images[rows])


def _node(settings: Settings, data: FederatedData, index: int, device: torch.device) -> dict[str, Tensor]:
    """One client's state dict, from the cache or freshly trained."""
    name = f"widths {settings} {index} {device.type}"
    key = hashlib.sha256(name.encode() + data.parts[index].tobytes()).hexdigest()[:24]
    file = CACHE / f"{key}.safetensors"
    if file.is_file():
        return load_file(file)
    model = build_model(settings, data.shape, data.classes, seed=derived_seed(settings.seed, 2, index)).to(device)
    train(model, data.training_share(index), settings, derived_seed(settings.seed, 3, index))
    found = {each: value.contiguous() for each, value in to_device(model.state_dict(), torch.device("cpu")).items()}
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{index}.partial")
    save_file(found, partial)
    partial.rename(file)
    return found
