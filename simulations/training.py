"""Training on a client, evaluation on the server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from c2m3_fl.merging.recalibrate.head.reliability import Reliability
from simulations.data import Images
from simulations.language_models import LanguageModel
from simulations.settings import Settings

_BATCH = 500  # images per evaluation step


@dataclass(frozen=True)
class Scores:
    """Mean cross-entropy, accuracy, and expected calibration error in 15 bins (Guo et al. 2017)."""

    loss: float
    accuracy: float
    calibration_error: float


def default_device() -> torch.device:
    """CUDA if there is a device, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(model: nn.Module, images: Images, settings: Settings, seed: int, *, proximal: float = 0.0) -> float:
    """Train `model` in place for the local epochs of the settings, and return the mean loss of the last epoch.

    A last batch of one image is left out: it has no batch statistics.

    Parameters
    ----------
    model : nn.Module
        Trained in place.
    images : Images
        Training images.
    settings : Settings
        Optimiser, batches and epochs.
    seed : int
        Seed of the order of the batches.
    proximal : float
        FedProx's µ: the loss of every batch gets half of it times the squared distance from the initial parameters
        (Li et al. 2020, equation 2); the returned loss does not.
    """
    device = next(model.parameters()).device
    inputs, labels = images.inputs.to(device), images.labels.to(device)
    generator = torch.Generator().manual_seed(seed)
    optimiser = _optimiser(model, settings)
    start = [value.detach().clone() for value in model.parameters()]
    model.train()
    total = torch.zeros((), device=device)
    steps = 0
    for _ in range(settings.local_epochs):
        total, steps = torch.zeros((), device=device), 0
        for rows in torch.split(torch.randperm(len(images), generator=generator).to(device), settings.batch_size):
            if len(rows) == 1 < settings.batch_size and len(images) > 1:
                continue
            optimiser.zero_grad()
            loss = _loss(model, inputs[rows], labels[rows])
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            if proximal:
                _pull(model, start, proximal)
            optimiser.step()
            total, steps = total + loss.detach(), steps + 1
    return float(total / max(steps, 1))


def _loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    if isinstance(model, LanguageModel):
        return model.loss(inputs, labels)
    return nn.functional.cross_entropy(model(inputs), labels)


def _pull(model: nn.Module, start: Sequence[Tensor], proximal: float) -> None:
    """Add the gradient of the proximal term."""
    for value, before in zip(model.parameters(), start, strict=True):
        if value.grad is not None:
            value.grad.add_(value.detach() - before, alpha=proximal)


def _optimiser(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimiser == "sgd":
        return torch.optim.SGD(model.parameters(), rate, momentum=settings.momentum, weight_decay=decay)
    kind = torch.optim.Adam if settings.optimiser == "adam" else torch.optim.AdamW
    return kind(model.parameters(), rate, weight_decay=decay)


def log_probabilities(model: nn.Module, params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Log-probabilities of the classes, shape (images, classes), of `model` with other `params`."""
    model.load_state_dict(params)
    model.eval()
    device = next(model.parameters()).device
    with torch.inference_mode():
        return torch.cat([model(batch.to(device)).log_softmax(dim=1).cpu() for batch in torch.split(inputs, _BATCH)])


def score(predicted: Tensor, labels: Tensor) -> Scores:
    """Scores of log-probabilities, shape (images, classes)."""
    accuracy = (predicted.argmax(dim=1) == labels).double().mean()
    error = Reliability.of(predicted, labels, [1.0]).ece
    return Scores(float(nn.functional.nll_loss(predicted, labels)), float(accuracy), float(error))


def ensemble(predictions: Iterable[Tensor]) -> Tensor:
    """Log of the mean probability over models."""
    stacked = torch.stack(tuple(predictions))
    return torch.logsumexp(stacked, dim=0) - torch.log(torch.tensor(float(len(stacked))))
