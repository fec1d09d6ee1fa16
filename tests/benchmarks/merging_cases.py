"""The cases of the merging benchmarks: which networks, trained on what. Trained nodes are kept in a cache folder.

    python -m tests.benchmarks.merging_cases [CASE ...] [--seeds 0 1 2]

trains what is not in the cache yet.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from c2m3_fl.errors import ConfigError
from simulations.data import FederatedData, Images, derived_seed, federated_data
from simulations.models import build_model
from simulations.settings import Settings
from simulations.training import train

CACHE = Path(os.environ.get("C2M3_CACHE", Path(tempfile.gettempdir()) / "c2m3-fl-nodes"))


@dataclass(frozen=True)
class Case:
    """Networks to merge.

    Attributes
    ----------
    settings : Settings
        Data, network, partition and training.
    whole : bool
        Whether every node trains on all images (networks from different seeds) instead of a part (clients).
    title : str
        How the tables name it.
    layout : torch.memory_format
        Of the weights while training; channels last is a third faster on a CPU.
    """

    settings: Settings
    whole: bool
    title: str
    layout: torch.memory_format = torch.contiguous_format

    def seeded(self, seed: int) -> Case:
        """Return the same case with other partitions, initialisations and batches."""
        return replace(self, settings=replace(self.settings, seed=seed))


@dataclass(frozen=True, eq=False)
class Trained:
    """The trained nodes of a case.

    Attributes
    ----------
    model : nn.Module
        The architecture.
    nodes : list of dict
        State dicts.
    weights : list of float
        Numbers of training examples.
    calibration : list of Tensor
        Unlabelled batches that no node was trained on.
    test : Images
        What accuracies are measured on.
    data : FederatedData
        All of the data.
    """

    model: nn.Module
    nodes: list[dict[str, Tensor]]
    weights: list[float]
    calibration: list[Tensor]
    test: Images
    data: FederatedData


_DIGITS = Settings(data="digits", clients=3, partition="iid", calibration_size=300, batch_size=32)
_MNIST = Settings(
    data="mnist", model="mlp", clients=10, train_size=20_000, batch_size=64, local_epochs=2, calibration_size=1000
)
_CIFAR = Settings(
    data="cifar10",
    model="cnn",
    clients=4,
    train_size=20_000,
    test_size=5000,
    batch_size=64,
    local_epochs=8,
    optimiser="adam",
    learning_rate=1e-3,
    calibration_size=1000,
)
_ADAM = {"optimiser": "adam", "learning_rate": 1e-3}

CASES = {
    "digits-vgg": Case(
        replace(
            _DIGITS, model="vgg16", width=0.25, image_size=32, local_epochs=30, optimiser="adam", learning_rate=5e-4
        ),
        True,
        "digits, VGG16 (¼ width), 3 models",
    ),
    "digits-resnet-ln": Case(
        replace(_DIGITS, model="resnet20-ln", width=2.0, local_epochs=10, **_ADAM),
        True,
        "digits, ResNet20×2 LayerNorm, 3 models",
    ),
    "digits-resnet-bn": Case(
        replace(_DIGITS, model="resnet20-bn", width=2.0, local_epochs=10, **_ADAM),
        True,
        "digits, ResNet20×2 BatchNorm, 3 models",
    ),
    "mnist-iid": Case(replace(_MNIST, partition="iid"), False, "MNIST MLP, 10 clients, IID"),
    "mnist-dir.1": Case(replace(_MNIST, alpha=0.1), False, "MNIST MLP, 10 clients, Dirichlet .1"),
    "cifar-iid": Case(replace(_CIFAR, partition="iid"), False, "CIFAR-10 CNN, 4 clients, IID"),
    "cifar-dir.3": Case(replace(_CIFAR, alpha=0.3), False, "CIFAR-10 CNN, 4 clients, Dirichlet .3"),
    "cifar-iid-40k": Case(
        replace(_CIFAR, partition="iid", train_size=40_000),
        False,
        "CIFAR-10 CNN, 4 clients, IID, 40,000 images",
        torch.channels_last,
    ),
    "cifar-dir.3-40k": Case(
        replace(_CIFAR, alpha=0.3, train_size=40_000),
        False,
        "CIFAR-10 CNN, 4 clients, Dirichlet .3, 40,000 images",
        torch.channels_last,
    ),
}

_ENDPOINTS = replace(
    _CIFAR, clients=5, train_size=10_000, optimiser="sgd", learning_rate=0.05, weight_decay=5e-4, partition="iid"
)
_RESNET = replace(_ENDPOINTS, model="resnet20-bn", image_size=16, local_epochs=12)
_VGG = replace(_ENDPOINTS, model="vgg11-bn", width=0.25, local_epochs=6)
_VGG16 = replace(_VGG, model="vgg16-bn", train_size=20_000, local_epochs=15)
_DISJOINT = replace(_VGG, train_size=20_000, partition="pathological", classes_per_client=5)
_DIRICHLET = replace(_VGG, train_size=20_000, partition="dirichlet", alpha=0.5)
_FULL = {"train_size": 0, "test_size": 0, "image_size": 0, "batch_size": 128, "local_epochs": 100}

PUBLISHED = {
    name: Case(settings, whole, title, torch.channels_last)
    for name, settings, whole, title in (
        ("resnet", _RESNET, True, "5 ResNet20, 10,000 images of 16×16 pixels, 12 epochs"),
        ("vgg", _VGG, True, "5 VGG11 (¼ width), 10,000 images, 6 epochs"),
        ("vgg16", _VGG16, True, "5 VGG16 (¼ width), 20,000 images, 15 epochs"),
        ("vgg-many", replace(_VGG, clients=10), True, "10 VGG11 (¼ width), 10,000 images, 6 epochs"),
        ("vgg-disjoint", _DISJOINT, False, "5 VGG11 (¼ width), 20,000 images, five classes each"),
        ("vgg-dir.5", _DIRICHLET, False, "5 VGG11 (¼ width), 20,000 images, Dirichlet .5"),
        ("resnet-full", replace(_RESNET, width=4.0, **_FULL), True, "5 ResNet20×4, all images, 100 epochs"),
        ("vgg-full", replace(_VGG, model="vgg16-bn", width=1.0, **_FULL), True, "5 VGG16, all images, 100 epochs"),
    )
}


def trained(case: Case) -> Trained:
    """Nodes of a case, from the cache or freshly trained."""
    settings = case.settings
    data = federated_data(settings)
    nodes = [_node(case, data, index) for index in range(settings.clients)]
    sizes = [1.0 if case.whole else float(len(part)) for part in data.parts]
    model = build_model(settings, data.shape, data.classes, seed=0).eval()
    return Trained(model, nodes, sizes, data.calibration, data.held_out, data)


def _node(case: Case, data: FederatedData, index: int) -> dict[str, Tensor]:
    rows = b"" if case.whole else data.parts[index].tobytes()
    key = hashlib.sha256(f"{case.settings} {case.whole} {index}".encode() + rows).hexdigest()[:24]
    file = CACHE / f"{key}.safetensors"
    if file.is_file():
        return load_file(file)
    settings = case.settings
    model = build_model(settings, data.shape, data.classes, seed=derived_seed(settings.seed, 2, index))
    train(
        model.to(memory_format=case.layout), _images(case, data, index), settings, derived_seed(settings.seed, 3, index)
    )
    CACHE.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    return dict(model.state_dict())


def _images(case: Case, data: FederatedData, index: int) -> Images:
    if not case.whole:
        return data.training_share(index)
    shares = [data.training_share(other) for other in range(len(data.parts))]
    return Images(torch.cat([share.inputs for share in shares]), torch.cat([share.labels for share in shares]))


def validated(found: Trained, count: int = 4000) -> Trained:
    """The same, to be measured on training images that neither a node nor the calibration has seen.

    What is chosen with these in view may be measured on the test images afterwards.
    """
    used = np.concatenate([*found.data.parts, found.data.calibration_rows])
    rows = np.setdiff1d(np.arange(len(found.data.train.labels)), used)
    if len(rows) < count:
        raise ConfigError(f"{len(rows)} training images are left, expected at least {count}")
    rows = np.random.default_rng(0).permutation(rows)[:count]
    data = replace(found.data, test=found.data.train, test_rows=rows)
    return replace(found, test=data.held_out)


def probabilities(model: nn.Module, params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Class probabilities of a network."""
    model.load_state_dict(params)
    with torch.inference_mode():
        return torch.cat([model.eval()(batch).softmax(1) for batch in inputs.split(500)])


def accuracy(model: nn.Module, params: Mapping[str, Tensor], test: Images) -> float:
    """Share of test images that a network classifies correctly."""
    return float((probabilities(model, params, test.inputs).argmax(1) == test.labels).double().mean())


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description="Train the networks of the merging benchmarks.")
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for name in arguments.cases or list(CASES):
            begin = time.perf_counter()
            found = trained((CASES | PUBLISHED)[name].seeded(seed))
            scores = [accuracy(found.model, node, found.test) for node in found.nodes]
            print(name, seed, [round(score, 3) for score in scores], f"{time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
