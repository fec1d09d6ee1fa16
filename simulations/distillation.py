"""Ensemble distillation: the average is trained towards the clients' mean logits on unlabelled images.

Lin, Kong, Stich and Jaggi, "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020,
algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from c2m3_fl.core.spec import Params
from c2m3_fl.flower.incoming.records import from_params, to_params

_STEPS = 300  # the paper takes up to 10,000, on far more images than these servers have
_RATE = 1e-3  # Adam's learning rate in the paper, annealed along a cosine
_BATCH = 128  # the paper's
_LOOKS = 10  # number of measurements of the divergence on all images


class FedDF(FedAvg):
    """FedAvg whose aggregate is then fitted to the mean of the clients' logits on the server's images.

    Parameters
    ----------
    model : nn.Module
        The architecture; not mutated.
    inputs : sequence of Tensor
        The server's unlabelled images, in batches of any size.
    steps : int
        Steps of Adam per round.
    **options
        Of `FedAvg`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        inputs: Sequence[Tensor],
        steps: int = _STEPS,
        **options: Any,  # noqa: ANN401  # FedAvg's own
    ) -> None:
        super().__init__(**options)
        self.model = model
        self.inputs = torch.cat(tuple(inputs))
        self.steps = steps

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average, then distil; the round seeds the order of the images."""
        messages = [reply for reply in replies if not reply.has_error()]
        teachers = [to_params(record) for reply in messages for record in reply.content.array_records.values()]
        arrays, metrics = super().aggregate_train(server_round, messages)
        if arrays is None:
            return None, metrics
        student = distil(self.model, to_params(arrays), teachers, self.inputs, steps=self.steps, seed=server_round)
        return from_params(student), metrics


def distil(
    model: nn.Module, student: Params, teachers: Sequence[Params], inputs: Tensor, *, steps: int = _STEPS, seed: int = 0
) -> dict[str, Tensor]:
    """The student, trained towards the teachers' mean logits, at its least measured divergence from them.

    The divergence on all inputs is never larger than before the training.

    Parameters
    ----------
    model : nn.Module
        The architecture; not mutated.
    student : mapping of str to Tensor
        Initial state dict; not mutated.
    teachers : sequence of mappings of str to Tensor
        The ensemble, equally weighted as in the paper's equation 3.
    inputs : Tensor
        Unlabelled inputs, shape (images, …).
    steps : int
        Steps of Adam, of 128 images each.
    seed : int
        Seed of the order of the images.
    """
    wanted = torch.stack([_logits(model, teacher, inputs) for teacher in teachers]).mean(dim=0).softmax(dim=1)
    return distil_towards(model, student, wanted, inputs, steps=steps, seed=seed)


def distil_towards(
    model: nn.Module, student: Params, wanted: Tensor, inputs: Tensor, *, steps: int = _STEPS, seed: int = 0
) -> dict[str, Tensor]:
    """The student, trained towards class probabilities: see `distil`.

    Parameters
    ----------
    model, student, inputs, steps, seed
        As there.
    wanted : Tensor
        Class probabilities, shape (images, classes).
    """
    network = deepcopy(model)
    network.load_state_dict(student)
    optimiser = torch.optim.Adam(network.parameters(), _RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    generator = torch.Generator().manual_seed(seed)
    best, least = _state(network), _divergence(network, inputs, wanted)
    for step in range(1, steps + 1):
        rows = torch.randperm(len(inputs), generator=generator)[:_BATCH]
        network.train()
        optimiser.zero_grad()
        loss = nn.functional.kl_div(network(inputs[rows]).log_softmax(dim=1), wanted[rows], reduction="batchmean")
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimiser.step()
        schedule.step()
        if step % max(steps // _LOOKS, 1) == 0:
            now = _divergence(network, inputs, wanted)
            best, least = (_state(network), now) if now < least else (best, least)
    return best


@torch.no_grad()
def _logits(model: nn.Module, params: Params, inputs: Tensor) -> Tensor:
    network = deepcopy(model).eval()
    network.load_state_dict(params)
    outputs: Tensor = network(inputs)
    return outputs


@torch.no_grad()
def _divergence(network: nn.Module, inputs: Tensor, wanted: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the network's class probabilities from the wanted ones."""
    predicted = network.eval()(inputs).log_softmax(dim=1)
    return float(nn.functional.kl_div(predicted, wanted, reduction="batchmean"))


def _state(network: nn.Module) -> dict[str, Tensor]:
    state: Mapping[str, Tensor] = network.state_dict()
    return {name: value.detach().clone() for name, value in state.items()}
