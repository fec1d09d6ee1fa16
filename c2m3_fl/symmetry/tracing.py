"""Label the tensors of a functional ATen graph: one pass over its nodes, one rule per operator."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from c2m3_fl.network.exporting import aliases
from c2m3_fl.symmetry.facts import Atoms, Structure
from c2m3_fl.symmetry.labels import Labels, Shape
from c2m3_fl.symmetry.linear_uses import Use, note_use
from c2m3_fl.symmetry.pieces import Join, joins
from c2m3_fl.symmetry.rules.elementwise import cast, constant, elementwise
from c2m3_fl.symmetry.rules.registry import (
    INDEXING,
    RULES,
    SAME_ENTRIES,
    Call,
    Result,
    Rule,
    expose,
    unknown,
)
from c2m3_fl.symmetry.shared_entries import tie_shared
from c2m3_fl.symmetry.tables import pin_tables, pin_unread, varying
from c2m3_fl.symmetry.unit_labels import combine, in_order

_FOLDED = 2**22  # results with more entries are not evaluated: they count as ordered


def label_graph(program: ExportedProgram, model: nn.Module, structure: Structure) -> set[str]:
    """Add all facts of one exported forward pass to `structure`.

    Returns
    -------
    set of str
        State-dict names of the tensors that the pass uses; tied tensors by their first name.
    """
    return _Labeller(program, model, structure).run()


def is_plain(program: ExportedProgram) -> bool:
    """Whether every operator has a rule, and operators that write in place leave all labels valid.

    ``relu_`` keeps the unit of every coordinate. So does ``x += y`` if `x` is computed from parameters or inputs and is
    not a constant: the units of `x` and `y` are tied, so the labels of `x` and of its views stay valid.
    """
    constants = {
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind not in (InputKind.USER_INPUT, InputKind.PARAMETER)
    }
    computed: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            return False
        if node.op == "placeholder" and node.name not in constants:
            computed.add(node)
        if node.op != "call_function" or node.target is operator.getitem:
            computed.update(node for source in node.all_input_nodes if source in computed)
            continue
        name = _rule_name(node)
        if name not in RULES:
            return False
        if RULES[name] is not constant and any(source in computed for source in node.all_input_nodes):
            computed.add(node)
        if _in_place(node) and not (RULES[name] is elementwise and set(node.all_input_nodes) <= computed):
            return False
    return True


def _in_place(node: fx.Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _entry_by_entry(node: fx.Node) -> bool:
    return len(node.all_input_nodes) == 1 and RULES.get(_rule_name(node)) in (elementwise, cast) and not _in_place(node)


def _rule_name(node: fx.Node) -> str:
    """Name of an operator's rule: without overload; for an in-place operator, that of the functional one."""
    name = ".".join(str(node.target).split(".")[:2])
    return name.removesuffix("_") if _in_place(node) else name


class _Labeller:
    """Interpreter of one graph; `labels` and, for constants, `values` are kept per node."""

    def __init__(self, program: ExportedProgram, model: nn.Module, structure: Structure) -> None:
        self.program = program
        self.model = model
        self.structure = structure
        self.labels: dict[fx.Node, Any] = {}
        self.values: dict[fx.Node, Any] = {}
        self.used: set[str] = set()
        self._stored: set[fx.Node] = set()
        self._buffers = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))
        self._first_name = aliases(model)
        state: Mapping[str, Any] = model.state_dict()
        self._state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self.joins = joins(program.graph, _entry_by_entry)
        self._inputs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}

    def run(self) -> set[str]:
        """Label all nodes in order."""
        cut = {node: join for join in self.joins.values() for node in join.nodes}
        for node in self.program.graph.nodes:
            self._locate(node)
            if node in cut and self._at_once(cut[node]):
                continue
            if node.op == "placeholder":
                self._placeholder(node)
            elif node in self.joins and self._at_once(self.joins[node]):
                self._note(self.joins[node].source)
                self.labels[node] = self.joins[node].labels(self.structure, self.labels)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self._output(node)
        read = {str(self._inputs[node.name].target) for node in self.labels if node.op == "placeholder" and node.users}
        tie_shared(self.structure, self.model, self._state, self._first_name, read)
        pin_tables(self.structure, self._state, self._buffers)
        pin_unread(self.structure)
        return self.used

    def _at_once(self, join: Join) -> bool:
        """Whether pieces can be cut at once: not from a constant, and not from an index."""
        found = self.labels.get(join.source)
        return isinstance(found, Labels) and found.points is None and join.source not in self.values

    def _note(self, source: fx.Node) -> None:
        """Note that the units of a tensor are read one by one, piece by piece."""
        for factor in self.labels[source].factors:
            self.structure.read_singly(factor)

    def _locate(self, node: fx.Node) -> None:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        self.structure.module = stack[-1][0] if stack else ""
        self.structure.operator = str(node.target).removesuffix(".default") if node.op == "call_function" else ""

    def _placeholder(self, node: fx.Node) -> None:
        spec = self._inputs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            value = node.meta.get("val")
            self.labels[node] = Labels.ordered(value.shape) if isinstance(value, Tensor) else value
            return
        name = str(spec.target)
        if name not in self._state:
            self._constant(node, self._content(name))
            return
        tensor, name = self._state[name], self._first_name.get(name, name)
        if node.users:
            self.used.add(name)
        if not (tensor.is_floating_point() or tensor.is_complex()):
            self._stored.add(node)
            self._constant(node, tensor)
            for dim, size in enumerate(tensor.shape):
                self.structure.pin(self.structure.axis(name, dim, size), "holds integers, not units")
            return
        self.labels[node] = self._parameter(name, tensor)

    def _content(self, name: str) -> Tensor:
        constants: Mapping[str, Any] = self.program.constants
        return constants[name] if name in constants else dict(self.program.named_buffers())[name]

    def _parameter(self, name: str, tensor: Tensor) -> Labels:
        factors = []
        for dim, size in enumerate(tensor.shape):
            atoms = self.structure.axis(name, dim, size)
            if size > 1:
                factors.append(atoms.reshape([size if other == dim else 1 for other in range(tensor.ndim)]))
        return Labels(tuple(tensor.shape), tuple(factors), frozenset(), name)

    def _constant(self, node: fx.Node, value: Tensor) -> None:
        self.values[node] = value
        self.labels[node] = self._fixed(node, value)

    def _fixed(self, node: fx.Node, value: Tensor) -> Labels:
        """Labels of a constant; what the state dict holds may be other numbers in another network."""
        labels = Labels(tuple(value.shape), (), frozenset(varying(value)))
        if node in self._stored:
            return labels
        content = value.detach().cpu()
        exact = content.double() if content.is_floating_point() else content.resolve_conj()
        return replace(labels, content=exact.numpy())

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            (source,), index = node.all_input_nodes, node.args[1]
            self.labels[node] = self.labels[source][index]
            if source in self.values:
                self.values[node] = self.values[source][index]
            if source in self._stored:
                self._stored.add(node)
        elif not _shapes(node):
            self.labels[node] = node.meta.get("val")
        elif not self._fold(node):
            self.labels[node] = self._apply(node)

    def _fold(self, node: fx.Node) -> bool:
        """Evaluate an operator whose inputs are constants."""
        if any(source not in self.values for source in node.all_input_nodes):
            return False
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if random or not callable(node.target) or sum(int(np.prod(shape)) for shape in _shapes(node)) > _FOLDED:
            return False
        args = fx.map_arg(node.args, self.values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self.values.__getitem__)
        with torch.no_grad():
            result = node.target(*args, **kwargs)
        if self._stored.intersection(node.all_input_nodes):
            self._stored.add(node)
        if isinstance(result, Tensor):
            self._constant(node, result)
        else:
            self.values[node] = result
            self.labels[node] = tuple(self._fixed(node, x) if isinstance(x, Tensor) else x for x in result)
        return True

    def _apply(self, node: fx.Node) -> Result:
        name = _rule_name(node)
        call = Call(self.structure, _shapes(node), self._known(node))
        indices = [x for x in map(self.labels.get, node.all_input_nodes) if isinstance(x, Labels) and x.points]
        if name not in INDEXING | SAME_ENTRIES:
            for x in indices:
                expose(self.structure, x)
        args = fx.map_arg(node.args, self.labels.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self.labels.__getitem__)
        if self.structure.folded is not None:
            note_use(Use(self.structure, node, name, args, kwargs), self.structure.folded)
        apply: Rule = RULES.get(name, unknown)
        try:
            result = apply(call, *args, **kwargs)
        except (ValueError, IndexError, TypeError, KeyError, AttributeError):  # a form that the rule does not know
            result = unknown(call, *args, form=" with these arguments", **kwargs)
        if indices and name in SAME_ENTRIES:
            result = pytree.tree_map(partial(replace, points=indices[0].points), result)
        if _in_place(node):
            self.labels[node.all_input_nodes[0]] = result  # the first argument is the tensor that is written to
        return result

    def _known(self, node: fx.Node) -> dict[int, Atoms]:
        """Integer arguments whose content is known, by position; the first index of a list of indices."""
        known = {}
        for place, value in enumerate(node.args):
            found = [x for x in value if x is not None] if isinstance(value, list | tuple) else [value]
            if len(found) == 1 and isinstance(found[0], fx.Node) and isinstance(self.values.get(found[0]), Tensor):
                known[place] = self.values[found[0]].cpu().numpy()
        return known

    def _output(self, node: fx.Node) -> None:
        outputs = node.args[0]
        assert isinstance(outputs, list | tuple)  # one entry per output, by the format of exported programs
        for spec, value in zip(self.program.graph_signature.output_specs, outputs, strict=True):
            found = self.labels.get(value) if isinstance(value, fx.Node) else None
            mutated = spec.target if spec.kind is OutputKind.BUFFER_MUTATION else None
            if mutated in self._state:
                self.structure.written.add(self._first_name.get(mutated, mutated))
            if not isinstance(found, Labels):
                continue
            if mutated in self._state:
                name = self._first_name.get(mutated, mutated)
                combine(self.structure, found, self._parameter(name, self._state[spec.target]))
            elif spec.kind is OutputKind.USER_OUTPUT:
                in_order(self.structure, expose(self.structure, found), range(found.ndim), "network output")


def _shapes(node: fx.Node) -> tuple[Shape, ...]:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(tuple(int(size) for size in x.shape) for x in values if isinstance(x, Tensor))
