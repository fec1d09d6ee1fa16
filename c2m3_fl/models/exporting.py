"""From a module to a functional ATen graph, through `torch.export`, without touching the module."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from c2m3_fl.errors import TraceError

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_LOCATION = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<where>\w+)\s+(?P<code>[^\n]+)')
_LIBRARY = re.compile(r"[/\\](torch|site-packages)[/\\]")


def as_inputs(example_inputs: ExampleInputs) -> Inputs:
    """Positional and keyword arguments of one call: a tensor, a tuple or list of arguments, or a dict of keywords."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


@contextlib.contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Evaluation mode, or training mode without dropout, for a while; every submodule gets its own mode back."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    for module in before:
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Attention spelled out: its fused inference path is one opaque operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines of the exporter: what matters is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def export(
    model: nn.Module, inputs: Inputs, is_plain: Callable[[ExportedProgram], bool], *, training: bool = False
) -> ExportedProgram:
    """ATen graph of one forward pass; made functional, which takes as long again, unless it `is_plain` already.

    Raises
    ------
    TraceError
        When `torch.export` refuses the network, naming the line that it refuses.
    """
    args, kwargs = inputs
    with mode(model, training=training), plain_attention(), quiet(), torch.enable_grad():
        try:
            program = torch.export.export(model, args, kwargs, strict=False)
            return program if is_plain(program) else program.run_decompositions({})
        except Exception as error:
            raise TraceError(_explain(model, error)) from error


def _explain(model: nn.Module, error: Exception) -> str:
    return (
        f"torch.export cannot trace {type(model).__name__}{_line(error)}: {_first_sentence(error)}. "
        "Control flow must not depend on the values of tensors: use torch.where or torch.cond, take the branch "
        "out of forward(), or give a PermutationSpec by hand"
    )


def _line(error: Exception) -> str:
    """The innermost line of the user's own code that the traceback, or the error's text, points at."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno, trace.tb_frame.f_code.co_name))
        trace = trace.tb_next
    own = [frame for frame in frames if not _LIBRARY.search(frame[0]) and frame[0] != __file__ and "<" not in frame[0]]
    named = [match for match in _LOCATION.finditer(str(error)) if not _LIBRARY.search(match["file"])]
    if named:
        return f" at {named[-1]['file']}:{named[-1]['line']} ({named[-1]['code'].strip()})"
    own = [frame for frame in own if frame[2] == "forward"] or own[-1:]
    return f" at {own[-1][0]}:{own[-1][1]} (in {own[-1][2]})" if own else ""


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:200]


def aliases(model: nn.Module) -> dict[str, str]:
    """First name of every parameter and buffer, by each of its names: tied tensors have several."""
    first: dict[int, str] = {}
    named: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    named += [*model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(value), name) for name, value in named}
