"""A network as a list of operators: exported once, then run node by node with any parameters.

Statistics are measured, and parameters corrected, at every parameterised operator in forward order. Some operators
have no module of their own (the packed projections of attention), so forward hooks would miss them. The exported
graph contains them all; a `Walk` runs it and can stop at any of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError
from c2m3_fl.network.calibration import Batch, ExampleInputs, as_batch, unfit
from c2m3_fl.network.copying import private_copy
from c2m3_fl.network.exporting import aliases, call_fails, export
from c2m3_fl.network.find_operators import find_operators
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.shared_storage import sharing


@dataclass(frozen=True, eq=False)
class Program:
    """A traced network.

    Attributes
    ----------
    graph : fx.Graph
        ATen calls in forward order; placeholders are parameters, buffers, constants and inputs.
    names : mapping of str to str
        State-dict name of every placeholder that stands for a parameter or a persistent buffer.
    constants : mapping of str to Tensor
        Value of every placeholder that is neither in `names` nor in `inputs`.
    inputs : tuple of str
        The placeholders of the network's inputs, in order.
    operators : tuple of Operator
        The parameterised operators that can be measured and corrected, in forward order.
    skipped : mapping of str to str
        State-dict names of the parameters that belong to no such operator, with the reason.
    aliases : mapping of str to tuple of str
        Further state-dict names of tied parameters.
    last_use : mapping of fx.Node to int
        Index in the graph of the last node that uses a node's value.
    """

    graph: fx.Graph
    names: Mapping[str, str]
    constants: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    operators: tuple[Operator, ...]
    skipped: Mapping[str, str]
    aliases: Mapping[str, tuple[str, ...]]
    last_use: Mapping[fx.Node, int]

    def assign(self, params: dict[str, Tensor], name: str, value: Tensor) -> None:
        """Replace a parameter in `params`, under all its names, keeping its dtype.

        Parameters
        ----------
        params : dict of str to Tensor
            State dict; changed in place.
        name : str
            One name of the parameter.
        value : Tensor
            The new value.
        """
        for alias in self.all_names(name):
            params[alias] = value.to(params[alias].dtype)

    def all_names(self, name: str) -> tuple[str, ...]:
        """A parameter's names in the state dict: more than one if it is tied."""
        return (name, *self.aliases.get(name, ()))


class Walk:
    """Runs a network on one batch, node by node; values are dropped after their last use.

    Parameters
    ----------
    program : Program
        The traced network.
    params : mapping of str to Tensor
        State dict, read whenever a node runs: a correction made in between applies to all later nodes.
    batch : Batch
        Inputs of the shapes that the program was traced with.
    """

    def __init__(self, program: Program, params: Params, batch: Batch) -> None:
        self._program = program
        self._params = params
        self._nodes = list(program.graph.nodes)
        self._values: dict[fx.Node, Any] = {}
        self._next = 0
        self._batch = batch
        self._inputs = dict(zip(program.inputs, batch.inputs, strict=True))

    def advance(self, index: int) -> None:
        """Run every node before `index`."""
        while self._next < index:
            node = self._nodes[self._next]
            if node.name not in self._program.names:  # parameters are read when they are used
                self._values[node] = self.value(node)
            self._next += 1
            for used in {node, *node.all_input_nodes}:
                if self._program.last_use[used] < self._next:
                    self._values.pop(used, None)

    def value(self, node: fx.Node) -> Any:  # noqa: ANN401  # a node's value may be a tensor, a size, a tuple, …
        """Value of a node. The value of a node that has not run is computed from its inputs' values, and not stored."""
        if node.name in self._program.names:
            return self._params[self._program.names[node.name]]
        if node in self._values:
            return self._values[node]
        if node.op == "placeholder":
            constant = self._program.constants.get(node.name)
            return self._inputs[node.name].clone() if constant is None else constant  # operators may work in place
        if node.op == "output":
            return fx.map_arg(node.args[0], self.value)
        if node.op == "get_attr":
            return _attribute(self._program.graph, str(node.target))
        assert callable(node.target)
        args, kwargs = fx.map_arg(node.args, self.value), fx.map_arg(node.kwargs, self.value)
        with feeding(self._batch, self._params):
            return node.target(*args, **kwargs)

    def output(self, operator: Operator) -> Tensor:
        """Run up to and including an operator, and return its output."""
        self.advance(operator.index + 1)
        result: Tensor = self.value(operator.node)
        return result

    @property
    def resident(self) -> int:
        """Bytes of the activations in memory."""
        kept = (value for node, value in self._values.items() if node.op != "placeholder")
        return sum(value.numel() * value.element_size() for value in kept if isinstance(value, Tensor))

    def finish(self) -> Any:  # noqa: ANN401  # as above
        """Run to the end and return the network's outputs, flattened."""
        self.advance(len(self._nodes) - 1)
        return self.value(self._nodes[-1])


@contextlib.contextmanager
def feeding(batch: Batch, params: Params) -> Iterator[None]:
    """Context that turns exceptions of the network into a `CalibrationError` that names the calibration batch."""
    try:
        yield
    except (CalibrationError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise unfit(batch, params, error) from error


def check_batches(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Run the network, in evaluation mode, on calibration batches.

    Of floating-point batches of one kind only the first is run. Token ids may be out of range in any batch, so all
    batches with integer inputs are run.

    Raises
    ------
    CalibrationError
        When the network cannot take a batch.
    """
    twin = private_copy(model).to(batches[0].inputs[0].device).eval()
    seen = set()
    for batch in batches:
        if batch.kind in seen and all(value.is_floating_point() for value in batch.inputs):
            continue
        seen.add(batch.kind)
        error = call_fails(twin, batch.call)
        if error is not None:
            raise unfit(batch, twin.state_dict(), error) from error


def export_program(model: nn.Module, example: ExampleInputs | Batch) -> Program:
    """Export a network in evaluation mode and find its parameterised operators.

    Parameters
    ----------
    model : nn.Module
        Not mutated.
    example : Tensor, tuple, dict or Batch
        Example inputs; the program takes inputs of exactly these shapes and names, on their device.

    Raises
    ------
    TraceError
        When `torch.export` refuses the network.
    """
    batch = as_batch(example)
    twin = private_copy(model).to(batch.inputs[0].device)
    exported = export(twin, batch.call)
    signature = exported.graph_signature
    persistent = twin.state_dict()
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names = {placeholder: name for placeholder, name in held.items() if name in persistent}
    loose = {**held, **signature.inputs_to_lifted_tensor_constants}
    constants = {
        placeholder: exported.constants[name].detach()
        for placeholder, name in loose.items()
        if placeholder not in names
    }
    graph = exported.graph
    operators, skipped = find_operators(graph, names, sharing(model))
    inputs = _in_order(exported, batch)
    return Program(graph, names, constants, inputs, operators, skipped, _further_names(twin), _last_uses(graph))


def _in_order(exported: ExportedProgram, batch: Batch) -> tuple[str, ...]:
    """The placeholders of the network's inputs, in the order of the batch's."""
    placeholders = tuple(str(name) for name in exported.graph_signature.user_inputs)
    if not batch.names:
        return placeholders
    keywords: Sequence[str] = exported.call_spec.in_spec.child(1).context
    found = dict(zip(keywords, placeholders, strict=True))
    return tuple(found[name] for name in batch.names)


def export_batches(model: nn.Module, batches: Sequence[Batch], *, checked: bool = False) -> list[Program]:
    """One program per batch; batches of the same names, shapes and types share theirs.

    Parameters
    ----------
    model : nn.Module
        The network; not mutated.
    batches : sequence of Batch
        Calibration data.
    checked : bool
        Whether `check_batches` has accepted them already.

    Raises
    ------
    CalibrationError
        When the network cannot take a batch, or runs other operators on it than on the first.
    TraceError
        When `torch.export` refuses the network.
    """
    if not checked:
        check_batches(model, batches)
    found: dict[tuple[Any, ...], Program] = {}
    for batch in batches:
        if batch.kind not in found:
            found[batch.kind] = export_program(model, batch)
    programs = [found[batch.kind] for batch in batches]
    reference = [(operator.name, operator.weight) for operator in programs[0].operators]
    for batch, program in zip(batches, programs, strict=True):
        if [(operator.name, operator.weight) for operator in program.operators] != reference:
            raise CalibrationError(
                f"inputs of shapes {batch.shapes} run other operators than those of shapes {batches[0].shapes}; "
                "pass calibration batches of one shape"
            )
    return programs


def _last_uses(graph: fx.Graph) -> dict[fx.Node, int]:
    last: dict[fx.Node, int] = {}
    for index, node in enumerate(graph.nodes):
        last[node] = index if node.users else index + 1  # an unused value is kept for `output` to read
        for used in node.all_input_nodes:
            last[used] = index
    return last


def _further_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The other state-dict names of every tensor that has several."""
    first = aliases(model)
    holders: dict[str, list[str]] = {}
    for name in model.state_dict():
        holders.setdefault(first.get(name, name), []).append(name)
    return {name: tuple(o for o in names if o != name) for names in holders.values() for name in names}


def _attribute(graph: fx.Graph, path: str) -> Any:  # noqa: ANN401  # as above
    value: Any = graph.owning_module
    for part in path.split("."):
        value = getattr(value, part)
    return value
