"""Which modes and batch sizes run other operators than the example: they must be traced as well.

A network may branch on training mode, or on the size of the batch. Its operators are recorded in both modes and for
other batch sizes, without computing anything where the network runs on meta tensors. Settings that run the operators of
one that is traced need no trace of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from c2m3_fl.network.calibration import Inputs
from c2m3_fl.network.copying import private_copy
from c2m3_fl.network.exporting import aliases, mode, plain_attention
from c2m3_fl.symmetry.recording import Operation, Recorder, Ref, Tape, replace_tensors

_SIZES = (1, 34)  # a single example, and many
_NOISE = ("empty", "new_empty", "zeros", "new_zeros", "ones", "new_ones", "full", "new_full", "rand", "bernoulli")
_SAME = ("detach", "alias", "lift_fresh", "clone", "contiguous", "to_copy")
_SHAPE = ("view", "unsafe_view", "reshape", "expand", "squeeze", "unsqueeze", "as_strided")
_PRODUCTS = ("mm", "bmm", "matmul")
_CUTS = ("select", "slice", "flip", "roll", "permute", "transpose", "split", "unbind", "narrow", "cat", "index")

Program = tuple[Hashable, ...]


@dataclass(frozen=True)
class ProofSetting:
    """A way to run a network.

    Attributes
    ----------
    training : bool
        Whether in training mode, without dropout.
    inputs : Inputs
        The arguments of a call.
    batch : int
        Number of examples, or 0 if it is that of the example inputs.
    """

    training: bool
    inputs: Inputs
    batch: int = 0

    def __str__(self) -> str:
        words = "training mode" if self.training else "evaluation mode"
        return f"{words}, a batch of {self.batch}" if self.batch else words


@dataclass(frozen=True)
class Survey:
    """Settings with programs of their own, the example in evaluation mode first, and what those stand for.

    Attributes
    ----------
    distinct : tuple of ProofSetting
        One setting for every program.
    covered : mapping of ProofSetting to tuple of str
        The settings that run the same program, in words.
    """

    distinct: tuple[ProofSetting, ...]
    covered: tuple[tuple[str, ...], ...]


def survey(model: nn.Module, inputs: Inputs) -> Survey:
    """Find the settings of a network that run different operators.

    Parameters
    ----------
    model : nn.Module
        The network; not mutated.
    inputs : Inputs
        The example.
    """
    settings = [ProofSetting(training, inputs) for training in (False, True)]
    sizes = {size: resized for size in _SIZES if (resized := _resize(inputs, size)) is not None}
    settings += [ProofSetting(training, sizes[size], size) for training in (False, True) for size in sizes]
    for device in ("meta", "cpu"):
        programs: dict[Program, ProofSetting] = {}
        covered: dict[Program, list[str]] = {}
        for setting in settings if device == "meta" else [one for one in settings if one.batch < _SIZES[-1]]:
            found = _program(model, setting, device)
            if found is None and not programs:
                break  # values decide what this network runs: record it on numbers
            if found is not None:
                programs.setdefault(found, setting)
                covered.setdefault(found, []).append(str(setting))
        if programs:
            return Survey(tuple(programs.values()), tuple(tuple(covered[one]) for one in programs))
    return Survey((settings[0],), ((str(settings[0]),),))


def _resize(inputs: Inputs, size: int) -> Inputs | None:
    """The same inputs with another number of examples: the first dimension that all tensors of at least one share."""
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    count = leaves[0].shape[0] if leaves else 0
    if count in (0, size):
        return None

    def change(leaf: Any) -> Any:  # noqa: ANN401  # inputs may hold anything
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != count or leaf.layout != torch.strided:
            return leaf
        return leaf[torch.arange(size) % count]

    found: Inputs = pytree.tree_map(change, inputs)
    return found


def _program(model: nn.Module, setting: ProofSetting, device: str) -> Program | None:
    """The operators that a setting runs; None if it does not run."""
    first = aliases(model)
    try:
        twin = private_copy(model, share=device == "meta")
        state = {name: x.detach() for name, x in twin.state_dict().items() if first.get(name, name) == name}
        params = {name: x.to(device, torch.float64 if x.is_floating_point() else x.dtype) for name, x in state.items()}
        args, kwargs = pytree.tree_map(_on(device), copy.deepcopy(setting.inputs))
        recorder = Recorder(params, device)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), plain_attention(), recorder:
            torch.manual_seed(0)
            with mode(twin, training=setting.training):
                functional_call(twin, params, args, kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a setting that a network does not take
        return None
    return _summary(recorder.tape)


def _on(device: str) -> Callable[[Any], Any]:
    def move(value: Any) -> Any:  # noqa: ANN401  # inputs may hold anything
        if not isinstance(value, Tensor):
            return value
        return value.to(device, torch.float64 if value.is_floating_point() else value.dtype)

    return move


def _summary(tape: Tape) -> Program:
    """Operators and what each reads, without those that treat all units alike: masks of dropout, counters."""
    origin: dict[int, Hashable] = {number: name for name, number in tape.names.items()}
    origin |= dict.fromkeys(tape.constants, "constant")
    lines: list[Hashable] = []
    for operation in tape.operations:
        name = operation.name.rpartition("::")[2].strip("_")
        read: list[Ref] = []
        replace_tensors([operation.args, [*operation.kwargs.values()]], read.append, Ref)
        sources = [origin.get(ref.number, "constant") for ref in read]
        if name.startswith(_NOISE):
            new: Hashable = "noise"
        elif name in _SAME or name in _SHAPE:
            new = sources[0] if sources else "constant"
        elif "noise" in sources and len(set(sources) - {"noise"}) <= 1:
            new = next(iter(set(sources) - {"noise"}), "noise")
        elif name == "add" and operation.written and len(sources) == 1:
            new = sources[0]  # a counter
        elif name == "addmm":  # a batch of one is a matrix
            lines.append(("matmul", tuple(sources[1:]), ()))
            lines.append(("add", ((len(lines), 0), sources[0]), ()))
            new = None
        else:
            lines.append(("matmul" if name in _PRODUCTS else name, tuple(sources), _numbers(name, operation)))
            new = None
        for place, number in enumerate(operation.outputs):
            origin[number] = new if new is not None else (len(lines), place)
        for number in operation.written:
            origin[number] = new if new is not None else (len(lines), -1)
    return tuple(lines)


def _numbers(name: str, operation: Operation) -> Hashable:
    """Whole numbers among the arguments of operators that cut or reorder; not the end of a run of examples."""
    if not name.startswith(_CUTS):
        return ()
    found: list[int] = []
    replace_tensors(list(operation.args), found.append, int)
    if name.startswith("slice") and len(found) > 2 and found[0] == 0:
        found = found[:2]
    return tuple(found)
