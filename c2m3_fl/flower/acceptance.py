"""What replies must pass before they are matched, and a merged model before clients train it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from logging import WARNING
from typing import Any

import torch
from flwr.supercore import log
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import check_finite, norm
from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.aligning.aligned_replies import AlignedReplies
from c2m3_fl.flower.incoming.admitted import Dropped, Reply, Sorted, fault_of
from c2m3_fl.flower.incoming.buffers import Buffers
from c2m3_fl.flower.metrics import Numbers
from c2m3_fl.flower.setup import Setup
from c2m3_fl.network.calibration import Batch
from c2m3_fl.network.exporting import mode

_MODES = (False, True)  # of training
_FAR = 100.0  # a mean, a median or a server's step lies among the replies and the model that was sent


class Gate:
    """Where replies enter, and a merged model leaves.

    Parameters
    ----------
    setup : Setup
        Of the strategy.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._copies = Copies(setup.model)
        self._said = False

    @cached_property
    def _buffers(self) -> Buffers:
        found = Buffers.of(self._setup.model, self._setup.data.example).renamed(self._setup.names)
        tensors = self._setup.spec.tensors
        moving = frozenset(name for name in found.own if name in tensors and any(tensors[name].axes))
        return replace(found, own=found.own - moving, moving=moving)

    def admit(self, found: Sorted[Any], sent: Params) -> Sorted[Any]:
        """The replies with buffers that training can give; those that training does not change are the model's own.

        Parameters
        ----------
        found : Sorted
            The replies that passed the checks of one dialect.
        sent : mapping of str to Tensor
            The model that was sent out, in its own element types.
        """
        replies: list[Reply[Any]] = []
        dropped: list[Dropped] = []
        aligner = self._setup.aligner
        for reply in found.replies:
            own = aligner.own_basis(reply.node, sent) if aligner.basis == "client" else sent
            try:
                self._buffers.check(reply.params, own)
                if aligner.fold is not None:  # a scale of zero cannot be folded
                    check_finite(aligner.fold(reply.params))
                replies.append(self._buffers.with_own(reply, own))
            except Exception as error:  # whatever one reply holds must not end the round
                dropped.append(fault_of(reply.node, error))
        changed = sorted({name for reply in replies for name in reply.replaced})
        if changed and not self._said:
            self._said = True
            text = "\t> replies change %s, which training does not: the model's own are used, in every round"
            log(WARNING, text, ", ".join(map(repr, changed[:5])))
        replies.sort(key=lambda reply: (reply.content, reply.node))  # which buffers that are not used do not decide
        return replace(found, replies=tuple(replies), dropped=(*found.dropped, *dropped))

    def prepare(self) -> None:
        """Make now the copies of the network that `accept` runs."""
        self._copies.prepare(len(_MODES))

    def accept(self, merged: Params, aligned: AlignedReplies, sent: Params) -> Params:
        """A merged model with the model's own buffers; `ParamsError` where clients must not train it.

        Parameters
        ----------
        merged : mapping of str to Tensor
            What the wrapped strategy returned.
        aligned : AlignedReplies
            What it was given.
        sent : mapping of str to Tensor
            The model that was sent out, in its own element types.
        """
        restored = self._buffers.restore(merged, aligned.params, sent)
        check_norm(restored, [*aligned.sizes, norm(sent)])
        check_runs(self._copies, self._setup.data.example, self._own(restored), self._own(sent))
        return restored

    def sound(self, replies: Sequence[Params], sent: Params) -> list[bool]:
        """Which replies work by themselves on the example inputs, where the model that was sent out does.

        Parameters
        ----------
        replies : sequence of mappings of str to Tensor
            Those whose aggregate was not accepted.
        sent : mapping of str to Tensor
            The model that was sent out, in its own element types.
        """
        example = self._setup.data.example
        return [not fault(self._copies, example, self._own(reply), self._own(sent)) for reply in replies]

    def _own(self, params: Params) -> dict[str, Tensor]:
        """Exchanged tensors under the model's own names."""
        return {self._setup.names.get(name, name): value for name, value in params.items()}


def entry_numbers(found: Sorted[Any]) -> Numbers:
    """What was done to the replies of a round where they entered."""
    return {
        "c2m3-cast": sum(bool(reply.cast) for reply in found.replies),
        "c2m3-own-buffers": sum(bool(reply.replaced) for reply in found.replies),
        "c2m3-not-averaged": found.not_averaged,
    }


def check_norm(merged: Params, sizes: Sequence[float]) -> None:
    """Raise `ParamsError` for a merged model far smaller or larger than all replies and the model that was sent out.

    Parameters
    ----------
    merged : mapping of str to Tensor
        What the wrapped strategy returned.
    sizes : sequence of float
        Norms of the replies and of that model.
    """
    least, most, found = min(sizes) / _FAR, max(sizes) * _FAR, norm(merged)
    if not least <= found <= most:  # which NaN does not
        raise ParamsError(
            f"the merged model's norm is {found:.3g}, expected from {least:.3g} to {most:.3g}: "
            "from a hundredth of the smallest reply's to a hundred times the largest one's"
        )


class Copies:
    """Copies of a network that are run once, and may be made in advance.

    Parameters
    ----------
    model : nn.Module
        The network; not mutated.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._ready: list[nn.Module] = []

    def prepare(self, count: int) -> None:
        """Have so many copies ready."""
        while len(self._ready) < count:
            self._ready.append(deepcopy(self._model))

    def take(self) -> nn.Module:
        """A fresh copy."""
        return self._ready.pop() if self._ready else deepcopy(self._model)


def check_runs(model: nn.Module | Copies, example: Batch, merged: Params, sent: Params) -> None:
    """Raise `ParamsError` where the merged model raises, or gives NaN, on inputs on which the model sent out does not.

    See `fault` for the parameters; `merged` is the model to try.
    """
    found = fault(model, example, merged, sent)
    if found:
        raise ParamsError(f"the merged model {found} on the example inputs")


def fault(model: nn.Module | Copies, example: Batch, params: Params, sent: Params) -> str:
    """What a model does wrong on inputs on which the one that was sent out does not, predicting or training.

    Parameters
    ----------
    model : nn.Module or Copies
        The architecture; not mutated.
    example : Batch
        Inputs that it takes.
    params, sent : mapping of str to Tensor
        The model to try, and the one that was sent out.

    Returns
    -------
    str
        "" for nothing.
    """
    copies = Copies(model) if isinstance(model, nn.Module) else model
    for training in _MODES:
        found = _run(copies, example, params, training=training)
        if found and not _run(copies, example, sent, training=training):
            return found + (" in training mode" if training else "")
    return ""


def _run(copies: Copies, example: Batch, params: Params, *, training: bool) -> str:
    """What is wrong with a network and its outputs; "" for nothing."""
    try:
        network = copies.take()
        place = next((value.device for value in network.state_dict().values()), torch.device("cpu"))
        args, kwargs = tree_map(lambda value: value.to(place) if isinstance(value, Tensor) else value, example.call)
        network.load_state_dict(dict(params), strict=False)
        with mode(network, training=training), torch.random.fork_rng(devices=[]), torch.no_grad():
            outputs = network(*args, **kwargs)
    except Exception as error:
        return f"raises {type(error).__name__}: {error}"
    found = [value for value in tree_leaves(outputs) if isinstance(value, Tensor) and value.is_floating_point()]
    return "gives NaN" if any(bool(value.isnan().any()) for value in found) else ""
