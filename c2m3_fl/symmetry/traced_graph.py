"""A network's graph in evaluation mode, with the state-dict names of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from c2m3_fl.network.calibration import Inputs
from c2m3_fl.network.exporting import aliases, export


@dataclass(frozen=True, eq=False)
class TracedGraph:
    """The operators of one call.

    Attributes
    ----------
    graph : fx.Graph
        ATen calls in forward order.
    names : mapping of str to str
        State-dict name of every placeholder that stands for a parameter or a persistent buffer.
    aliases : mapping of str to tuple of str
        All state-dict names of every tensor.
    """

    graph: fx.Graph
    names: Mapping[str, str]
    aliases: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs) -> TracedGraph:
        """Trace a network; it is not mutated.

        Raises
        ------
        TraceError
            When `torch.export` refuses the network.
        """
        program = export(model, inputs)
        signature, state = program.graph_signature, model.state_dict()
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        names = {placeholder: name for placeholder, name in held.items() if name in state}
        shared: dict[str, list[str]] = {}
        for name, first in aliases(model).items():
            shared.setdefault(first, []).append(name)
        return cls(program.graph, names, {name: tuple(same) for same in shared.values() for name in same})

    def users(self, tensor: str) -> set[fx.Node]:
        """The calls that use a tensor, under any of its names."""
        held = set(self.aliases[tensor])
        nodes = (node for node in self.graph.nodes if node.op == "placeholder" and self.names.get(node.name) in held)
        return {user for node in nodes for user in node.users}
