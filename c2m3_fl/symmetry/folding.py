"""Fold the scales of norms into what reads them: the same function, of the same architecture, with scales of one.

Then rotations of a stream that only norms read are symmetries: RMSNorm divides by a length, which no rotation changes;
LayerNorm also subtracts the mean, so the rotations are those that keep the vector of ones. What writes to a stream of
LayerNorms, and what reads from it, is centred: the mean has no effect, and would count in a match.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ParamsError
from c2m3_fl.network.calibration import ExampleInputs, Inputs, inputs_beside
from c2m3_fl.network.calls import Outputs, choose_outputs
from c2m3_fl.symmetry.derive import tensors
from c2m3_fl.symmetry.differences import guilty
from c2m3_fl.symmetry.norms import Norm, Reader, find_norms
from c2m3_fl.symmetry.proof import Prover
from c2m3_fl.symmetry.streams import Axis, find_streams
from c2m3_fl.symmetry.traced_graph import TracedGraph


@dataclass(frozen=True)
class Folding:
    """The norms of a network whose scales can be folded, and the streams that can be centred.

    Attributes
    ----------
    norms : tuple of Norm
        Norms whose scale, and perhaps shift, all of their readers take.
    streams : tuple of tuple of (str, int)
        Of each stream that only LayerNorms read: the axes of the tensors that write to it.
    kept : mapping of str to str
        The scales of all other norms over the last dimension, each with the reason why it cannot be folded.
    names : mapping of str to tuple of str
        All names of every tensor.
    """

    norms: tuple[Norm, ...]
    streams: tuple[tuple[Axis, ...], ...]
    kept: Mapping[str, str]
    names: Mapping[str, tuple[str, ...]]

    @property
    def scales(self) -> frozenset[str]:
        """The scales that are folded, under all of their names."""
        return frozenset(name for norm in self.norms for name in self.names[norm.scale])

    def __str__(self) -> str:
        folded = [f"{norm.scale}: read by {', '.join(reader.weight for reader in norm.readers)}" for norm in self.norms]
        return "\n".join([*folded, *(f"{name} is kept: {reason}" for name, reason in self.kept.items())])

    def fold(self, params: Params) -> dict[str, Tensor]:
        """The state dict of the same function with scales of one.

        A shift goes into the biases of all readers; where one of them has no bias it stays with its norm.

        Raises
        ------
        ParamsError
            When a scale is zero in an entry whose shift must be divided by it.
        """
        found = dict(params)
        for norm in self.norms:
            scale = found[norm.scale].double()
            shift = found[norm.shift].double() if norm.shift else torch.zeros_like(scale)
            for reader in norm.readers:
                weight = _rows(found[reader.weight], reader.rows).double()
                if norm.folds_shift:
                    bias = _rows(found[reader.bias], reader.bias_rows).double() + _answer(weight, reader, shift)
                    self._assign(found, reader.bias, bias, reader.bias_rows)
                weight = weight * _along(scale, reader.axis, weight)
                if norm.centres:
                    weight = _centred(weight, reader.axis)
                self._assign(found, reader.weight, weight, reader.rows)
            self._assign(found, norm.scale, torch.ones_like(scale))
            if norm.shift:
                kept = torch.zeros_like(shift) if norm.folds_shift else _divided(shift, scale, norm.scale)
                self._assign(found, norm.shift, kept)
        for tensor, axis in (place for stream in self.streams for place in stream):
            self._assign(found, tensor, _centred(found[tensor].double(), axis))
        return found

    def unfold(self, params: Params, like: Params) -> dict[str, Tensor]:
        """The state dict of the same function with the scales, and where biases allow the shifts, of `like`.

        Raises
        ------
        ParamsError
            When a scale of `like` is zero in an entry.
        """
        found = dict(params)
        for norm in self.norms:
            scale = like[norm.scale].double()
            for reader in norm.readers:
                weight = _rows(found[reader.weight], reader.rows).double()
                weight = _divided(weight, _along(scale, reader.axis, weight), norm.scale)
                self._assign(found, reader.weight, weight, reader.rows)
                if norm.folds_shift:
                    answer = _answer(
                        _rows(found[reader.weight], reader.rows).double(), reader, like[norm.shift].double()
                    )
                    bias = _rows(found[reader.bias], reader.bias_rows).double() - answer
                    self._assign(found, reader.bias, bias, reader.bias_rows)
            self._assign(found, norm.scale, scale)
            if norm.shift:
                own = like[norm.shift].double() if norm.folds_shift else found[norm.shift].double() * scale
                self._assign(found, norm.shift, own)
        return found

    def _assign(self, params: dict[str, Tensor], name: str, value: Tensor, rows: range | None = None) -> None:
        for each in self.names[name]:
            own, part = params[each], value.to(params[each].dtype)
            params[each] = part if rows is None else torch.cat([own[: rows.start], part, own[rows.stop :]])


def fold(
    model: nn.Module, params: Params, example_inputs: ExampleInputs, *, outputs: Outputs | None = None
) -> dict[str, Tensor]:
    """Fold the scales of norms into what reads them; centre what writes to and reads from streams of LayerNorms.

    Parameters
    ----------
    model : nn.Module
        The architecture; not mutated.
    params : mapping of str to Tensor
        Its state dict; not mutated.
    example_inputs : Tensor, tuple or dict
        Arguments of one call, as for `permutation_spec`.
    outputs : str, int or sequence of them, optional
        The outputs that the caller reads; by default all tensors among them.

    Returns
    -------
    dict of str to Tensor
        A state dict of the same architecture that computes the same: the scales of `find_folding(...).norms` are one,
        the shifts zero where all readers have biases. Other norms are as they were; `find_folding(...).kept` says why.

    Raises
    ------
    ParamsError
        When a tensor is missing or of another shape, or a scale is zero in an entry whose shift no bias takes.
    TraceError
        When the network cannot be traced.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from c2m3_fl import fold, unfold
    >>> network, inputs = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), torch.randn(3, 4)
    >>> own = {name: value + 0.1 for name, value in network.state_dict().items()}
    >>> folded = fold(network, own, inputs)
    >>> folded["1.weight"], folded["1.bias"]
    (tensor([1., 1., 1., 1., 1., 1.]), tensor([0., 0., 0., 0., 0., 0.]))
    >>> back = unfold(network, folded, inputs, like=own)
    >>> torch.equal(back["1.weight"], own["1.weight"])
    True
    """
    _check(model, params, "params")
    return find_folding(model, example_inputs, outputs=outputs).fold(params)


def unfold(
    model: nn.Module, params: Params, example_inputs: ExampleInputs, *, like: Params, outputs: Outputs | None = None
) -> dict[str, Tensor]:
    """The inverse of `fold`: give the norms of folded params the scales and shifts of another state dict.

    Parameters
    ----------
    model : nn.Module
        The architecture; not mutated.
    params : mapping of str to Tensor
        A folded state dict; not mutated.
    example_inputs : Tensor, tuple or dict
        Arguments of one call, as for `permutation_spec`.
    like : mapping of str to Tensor
        The state dict whose scales and shifts the result has.
    outputs : str, int or sequence of them, optional
        The outputs that the caller reads; by default all tensors among them.

    Returns
    -------
    dict of str to Tensor
        A state dict that computes the same. Streams stay centred.

    Raises
    ------
    ParamsError
        When a tensor is missing or of another shape, or a scale of `like` is zero in an entry.
    TraceError
        When the network cannot be traced.
    """
    _check(model, params, "params")
    _check(model, like, "like")
    return find_folding(model, example_inputs, outputs=outputs).unfold(params, like)


def find_folding(model: nn.Module, example_inputs: ExampleInputs, *, outputs: Outputs | None = None) -> Folding:
    """What can be folded in a network, from its traced graph, proven on numbers; `print` shows it.

    Parameters
    ----------
    model : nn.Module
        The network; not mutated.
    example_inputs : Tensor, tuple or dict
        Arguments of one call, as for `permutation_spec`.
    outputs : str, int or sequence of them, optional
        The outputs that the caller reads; by default all tensors among them.

    Raises
    ------
    TraceError
        When the network cannot be called with the inputs, or `torch.export` refuses it.
    """
    chosen, inputs = choose_outputs(model, outputs), inputs_beside(model, example_inputs)
    return derive_folding(chosen, inputs, Prover(chosen, inputs))


def derive_folding(model: nn.Module, inputs: Inputs, prover: Prover) -> Folding:
    """The same, proven by a prover that exists."""
    traced = TracedGraph.of(model, inputs)
    norms, kept = find_norms(traced)
    return _proven(Folding(norms, find_streams(traced), kept, traced.aliases), prover)


def _proven(folding: Folding, prover: Prover) -> Folding:
    """Keep what does not fold without a change of the outputs."""

    def fails(parts: Callable[[Collection[str]], Folding]) -> Callable[[list[str]], bool]:
        return lambda chosen: not prover.error_of(parts(chosen).fold) <= prover.tolerance

    def norms(chosen: Collection[str]) -> Folding:
        return replace(folding, streams=(), norms=tuple(norm for norm in folding.norms if norm.scale in chosen))

    def streams(chosen: Collection[str]) -> Folding:
        return replace(folding, streams=tuple(folding.streams[int(number)] for number in chosen))

    wrong = guilty(fails(norms), [norm.scale for norm in folding.norms])
    reasons = dict.fromkeys(wrong, "folding it changes the outputs")
    right = tuple(norm for norm in folding.norms if norm.scale not in wrong)
    folding = replace(folding, norms=right, kept={**folding.kept, **reasons})
    numbers = list(map(str, range(len(folding.streams))))
    bad = guilty(fails(streams), numbers)
    return streams([number for number in numbers if number not in bad])


def _check(model: nn.Module, params: Params, where: str) -> None:
    """Raise `ParamsError` unless params have the tensors of the model's state dict."""
    for name, value in tensors(model).items():
        shape = tuple(params[name].shape) if name in params else None
        if shape != tuple(value.shape):
            raise ParamsError(
                f"{where}: {name!r} {'is missing' if shape is None else f'has shape {shape}'}, expected shape "
                f"{tuple(value.shape)}; pass a state dict of this {type(model).__name__}"
            )


def _rows(value: Tensor, rows: range | None) -> Tensor:
    return value if rows is None else value[rows.start : rows.stop]


def _along(values: Tensor, axis: int, whole: Tensor) -> Tensor:
    return values.reshape([-1 if other == axis else 1 for other in range(whole.ndim)])


def _centred(value: Tensor, axis: int) -> Tensor:
    return value - value.mean(axis, keepdim=True)


def _answer(weight: Tensor, reader: Reader, x: Tensor) -> Tensor:
    """What a reader answers to the same vector at every place: axes beyond input and output are summed over."""
    found = torch.tensordot(weight, x, dims=([reader.axis], [0]))
    return torch.as_tensor(found.reshape(found.shape[0], -1).sum(1))


def _divided(value: Tensor, scale: Tensor, name: str) -> Tensor:
    if bool(((scale == 0) & (value != 0)).any()):
        zeros = int((scale == 0).sum())
        raise ParamsError(
            f"{name!r} is zero in {zeros} of its {scale.numel()} entries, by which its shift or its readers' weights "
            "must be divided; set these entries to a small number"
        )
    return torch.where(scale == 0, 0.0, value / scale)
