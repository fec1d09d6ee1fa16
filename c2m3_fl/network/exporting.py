"""Export a module to an ATen graph with `torch.export`, without mutating the module."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from c2m3_fl.errors import C2M3Error, TraceError
from c2m3_fl.network.calibration import Inputs
from c2m3_fl.network.calls import as_called
from c2m3_fl.network.copying import private_copy
from c2m3_fl.network.inlining import inline_branches, plain_operators

_LOCATION = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<where>\w+)\s+(?P<code>[^\n]+)')
_LIBRARY = re.compile(r"[/\\](torch|site-packages)[/\\]")


@contextlib.contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Context of evaluation mode, or of training mode without dropout; restores every submodule's mode at the end."""
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
    """Context in which attention is exported as separate operators, not as the one fused operator for inference.

    A causal mask that is given is used as a mask: `nn.TransformerEncoder` would compare its values with those of the
    causal mask, to choose a faster kernel, and `torch.export` refuses that.
    """
    fused, transformer = torch.backends.mha.get_fastpath_enabled(), nn.modules.transformer
    detect = transformer._detect_is_causal_mask
    torch.backends.mha.set_fastpath_enabled(False)
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        transformer._detect_is_causal_mask = detect


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context without the exporter's log lines and the graphs that it prints when it fails; errors are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def export(
    model: nn.Module,
    inputs: Inputs,
    is_plain: Callable[[ExportedProgram], bool] | None = None,
    *,
    training: bool = False,
) -> ExportedProgram:
    """ATen graph of one forward pass.

    Parameters
    ----------
    model : nn.Module
        The network; not mutated.
    inputs : Inputs
        Positional and keyword arguments of one call.
    is_plain : callable, optional
        Whether a graph can be used without decomposition. A graph that cannot is decomposed into functional
        operators, which takes as long as the export. By default no graph is decomposed.
    training : bool
        Export training mode, without dropout, instead of evaluation mode.

    Raises
    ------
    TraceError
        When the network cannot be run on the inputs, or `torch.export` refuses it; the message names the line.
    """
    args, kwargs = inputs
    plain = as_called(private_copy(model, share=True))
    with mode(plain, training=training), plain_attention(), quiet(), torch.enable_grad():
        try:
            program = torch.export.export(plain, args, kwargs, strict=False)
            inline_branches(program.graph_module)
            if is_plain is not None and not is_plain(program):
                program = program.run_decompositions({})
            plain_operators(program, inputs)
        except C2M3Error:
            raise
        except Exception as error:
            require_runs(plain, inputs)
            raise TraceError(_explain(model, error)) from error
    return program


def call_fails(model: nn.Module, inputs: Inputs) -> Exception | None:
    """The exception that the network, in its present mode, raises on copies of the inputs; None if it raises none."""
    args, kwargs = copy.deepcopy(inputs)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except (C2M3Error, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return error
    return None


def require_runs(model: nn.Module, inputs: Inputs) -> None:
    """Raise `TraceError` unless the network, in its present mode, can be called with the example inputs."""
    error = call_fails(private_copy(model), inputs)
    if error is not None:
        raise TraceError(
            f"{type(model).__name__} cannot be called with the example inputs, {_described(inputs)}{_line(error)}: "
            f"{_first_sentence(error)}. Pass the arguments of one call, in the shapes and types that the network "
            "takes: a tensor, a tuple of positional arguments, or a dict of keyword arguments"
        ) from error


def _described(inputs: Inputs) -> str:
    """Types and shapes of the arguments of a call."""

    def describe(value: object) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
        return type(value).__name__

    args, kwargs = inputs
    described = [*map(describe, args), *(f"{name} = {describe(value)}" for name, value in kwargs.items())]
    return "(" + ", ".join(described) + ")"


def _explain(model: nn.Module, error: Exception) -> str:
    reason = f"torch.export cannot trace {type(model).__name__}{_line(error)}: {_first_sentence(error)}. "
    if re.search("data-dependent", f"{type(error).__name__} {error}", re.IGNORECASE):
        reason += (
            "Control flow must not depend on the values of tensors: use torch.where or torch.cond, take the branch "
            "out of forward()"
        )
    elif isinstance(error, KeyError) and "already exists" in str(error):
        reason += "torch.export keeps an attribute of that name itself: rename the tensor"
    else:
        reason += "Change that line, take it out of forward()"
    return f"{reason}, or give a PermutationSpec by hand"


def _line(error: Exception) -> str:
    """The innermost line of the user's code in the traceback or in the error's text."""
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
    """Map every name of a parameter or buffer to the tensor's first name; tied tensors have several names."""
    first: dict[int, str] = {}
    named: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    named += [*model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(value), name) for name, value in named}
