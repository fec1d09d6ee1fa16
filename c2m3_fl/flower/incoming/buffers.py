"""Tensors that are no parameters: what training changes of them comes from the replies, all else is the model's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import ordering_digest
from c2m3_fl.flower.incoming.admitted import Reply, TransientError
from c2m3_fl.network.calibration import Batch
from c2m3_fl.network.exporting import mode

Source = TypeVar("Source")

_MOST_BATCHES = 10**8  # that a client can count between two rounds


@dataclass(frozen=True)
class Buffers:
    """The tensors of a state dict that are no parameters, by what training does to them.

    Attributes
    ----------
    own : frozenset of str
        Training does not change them: masks, indices, constants of the graph.
    counters : frozenset of str
        Whole numbers that training changes.
    variances : frozenset of str
        Floating ones that training changes and whose name says variance: never negative.
    moving : frozenset of str
        Training does not change them, but they hold values per unit, which move with the units: a reply that started
        elsewhere may have them in another order.
    """

    own: frozenset[str]
    counters: frozenset[str]
    variances: frozenset[str]
    moving: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module, example: Batch) -> Buffers:
        """Look at what one step of training mode changes in a copy of the network.

        Where the example inputs cannot be used for training, statistics of normalisation layers are what training
        changes, and floating buffers of other modules count as changed.

        Parameters
        ----------
        model : nn.Module
            The network; not mutated.
        example : Batch
            Inputs that it takes.
        """
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state = model.state_dict()
        whole = {name for name, value in state.items() if not value.is_floating_point()}
        buffers = (state.keys() - parameters) | whole
        changed = _statistics(model) | _changed(model, example)
        return cls(
            frozenset(buffers - changed),
            frozenset(changed & whole),
            frozenset(name for name in (changed & buffers) - whole if "var" in name.rpartition(".")[2]),
        )

    def renamed(self, names: Mapping[str, str]) -> Buffers:
        """The same, in the names that clients send: `names` has the model's by those."""
        sent = {own: name for name, own in names.items()}
        return Buffers(
            *(
                frozenset(sent.get(name, name) for name in each)
                for each in (self.own, self.counters, self.variances, self.moving)
            )
        )

    def check(self, params: Params, sent: Params) -> None:
        """Raise `TransientError` for counters and variances that no training gives.

        Parameters
        ----------
        params : mapping of str to Tensor
            Of a reply.
        sent : mapping of str to Tensor
            What its client was sent.
        """
        for name in sorted(self.counters & params.keys()):
            value, before = params[name], sent[name]
            if not value.numel() or value.dtype == torch.bool:
                continue
            least, most = min(0, int(before.min())), int(before.max()) + _MOST_BATCHES
            if int(value.min()) < least or int(value.max()) > most:
                found = f"from {int(value.min())} to {int(value.max())}"
                raise TransientError(f"{name!r} counts {found}, expected numbers from {least} to {most}")
        for name in sorted(self.variances & params.keys()):
            if bool((params[name] < 0).any()) and not bool((sent[name] < 0).any()):
                raise TransientError(f"{name!r} has negative values, expected variances")

    def with_own(self, reply: Reply[Source], sent: Params) -> Reply[Source]:
        """The reply with the model's own tensors as they were sent to its client; itself where nothing differs."""
        differing = {n for n in self.own & reply.params.keys() if not torch.equal(reply.params[n], sent[n])}
        moving = self.moving & reply.params.keys()
        differing |= {
            n for n in moving if not torch.equal(*(each[n].flatten().sort()[0] for each in (reply.params, sent)))
        }
        if not differing:
            return reply
        params = {name: sent[name] if name in differing else value for name, value in reply.params.items()}
        _, _, metrics = reply.content.partition(" ")
        content = f"{ordering_digest(params)} {metrics}"
        return replace(reply, params=params, content=content, replaced=frozenset(differing), size=None)

    def restore(self, params: Params, replies: Sequence[Params], sent: Params) -> dict[str, Tensor]:
        """An aggregate with the model's own tensors, and with variances that are not negative.

        Server momentum goes beyond the replies, and so below zero: there the smallest variance of the replies is used.

        Parameters
        ----------
        params : mapping of str to Tensor
            The aggregate; not mutated.
        replies : sequence of mappings of str to Tensor
            What it was made of, aligned. Constants per unit are those that most of them have; where no constant has a
            majority, as when all started elsewhere, the aggregate's stay, except in masks.
        sent : mapping of str to Tensor
            The model that was sent out.
        """
        found = {name: sent[name].to(value.dtype) if name in self.own else value for name, value in params.items()}
        for name in self.moving & found.keys():
            found[name] = _agreed([reply[name] for reply in replies], found[name])
        for name in sorted(self.variances & found.keys()):
            value = found[name]
            if bool((value < 0).any()):
                least = torch.stack([reply[name] for reply in replies]).amin(0).to(value.dtype)
                found[name] = torch.where((value < 0) & (least >= 0), least, value)
        return found


def _agreed(values: Sequence[Tensor], otherwise: Tensor) -> Tensor:
    """What most of the values are, element by element; `otherwise` where no number has a majority.

    The mean of masks is no mask: they take the median, of two values the smaller one.
    """
    stacked = torch.stack(list(values))
    stacked = stacked.byte() if stacked.dtype == torch.bool else stacked
    middle = stacked.median(0).values
    if bool(((stacked == 0) | (stacked == 1)).all()):
        return middle.to(otherwise.dtype)
    majority = 2 * (stacked == middle).sum(0) > len(stacked)
    return torch.where(majority, middle.to(otherwise.dtype), otherwise)


def _statistics(model: nn.Module) -> set[str]:
    """Names of the statistics that normalisation layers keep."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _NormBase)
        for name, _ in module.named_buffers(recurse=False)
    }


def _changed(model: nn.Module, example: Batch) -> set[str]:
    """Names of the buffers that a step in training mode writes to; of all floating ones where it cannot be run."""
    for args, kwargs in _attempts(example):
        try:
            network = deepcopy(model)
            before = {name: (value, value._version, value.clone()) for name, value in _named(network)}
            with mode(network, training=True), torch.random.fork_rng(devices=[]), torch.no_grad():
                network(*args, **kwargs)
        except Exception:  # say, BatchNorm over a single example
            continue
        return {name for name, value in _named(network) if name not in before or _written(value, *before[name])}
    return {name for name, value in _named(model) if value.is_floating_point()}


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return model.named_buffers(remove_duplicate=False)


def _written(value: Tensor, before: Tensor, version: int, content: Tensor) -> bool:
    return value is not before or value._version != version or not torch.equal(value, content)


def _attempts(example: Batch) -> Iterator[tuple[tuple[object, ...], dict[str, object]]]:
    """Arguments of a call: noisy inputs, because zeros may leave a mean as it is; the inputs; these twice."""
    generator = torch.Generator().manual_seed(0)

    def noisy(value: object) -> object:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        return value + torch.randn(value.shape, generator=generator).to(value)

    def twice(value: object) -> object:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim else value

    for change in (noisy, deepcopy, twice):
        yield tree_map(change, example.call)
