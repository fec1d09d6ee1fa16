"""The permutation symmetries of a network: derived by tracing, proven on numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from c2m3_fl.core.spec import Axis, PermutationSpec, Pin, Segment, TensorSpec
from c2m3_fl.errors import SpecError, TraceError
from c2m3_fl.network.calibration import ExampleInputs, Inputs, as_inputs
from c2m3_fl.network.exporting import aliases, export
from c2m3_fl.symmetry.build_spec import build_spec
from c2m3_fl.symmetry.facts import Structure
from c2m3_fl.symmetry.proof import Prover, guilty
from c2m3_fl.symmetry.tracing import is_plain, label_graph

_DRAWS = 2  # one permutation may by chance be a symmetry that a wrong group contains


def permutation_spec(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    pin: Iterable[str] = (),
) -> PermutationSpec:
    """Derive which units of a network may be permuted without changing its function.

    The network is exported with `torch.export` and every ATen operator contributes what it proves about the axes of
    the parameters. What no rule proves is pinned and listed in `spec.pins`. Before it is returned the spec is checked
    on numbers: a group that does not leave the outputs unchanged is pinned as well.

    Parameters
    ----------
    model : nn.Module
        The network; neither its parameters nor its modes are changed.
    example_inputs : Tensor, tuple or dict
        Arguments of one call: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
    pin : iterable of str
        Parameters that shall not move: ``"conv1.weight"``, or one axis of one, ``"conv1.weight:1"``.

    Raises
    ------
    TraceError
        When the network cannot be called with the example inputs, or `torch.export` refuses it.
    SpecError
        When `pin` names a tensor or an axis that the network does not have.
    """
    inputs = as_inputs(example_inputs)
    spec, modes = derive(model, inputs, pin=pin)
    for training in modes:
        spec = prove(spec, Prover(model, inputs, training=training))
    return spec


def check_invariance(
    model: nn.Module,
    spec: PermutationSpec,
    example_inputs: ExampleInputs,
    *,
    draws: int = 1,
    seed: int = 0,
) -> float:
    """Largest relative change of any output under random permutations of all groups at once.

    The comparison runs on a copy in double precision (single where the network insists on it), with BatchNorm
    statistics and constant parameters (zero heads, layer scales) randomised. Rounding stays below 1e-9 (1e-4).

    Raises
    ------
    ParamsError
        When the spec does not describe this network's tensors.
    TraceError
        When the network cannot be called with the example inputs.
    """
    spec.check(_tensors(model), "model")
    prover = Prover(model, as_inputs(example_inputs), seed=seed)
    return max(prover.error(spec) for _ in range(draws))


def require_invariance(model: nn.Module, spec: PermutationSpec, example_inputs: ExampleInputs) -> None:
    """Accept a spec written by hand only if it fits the network and every group of it preserves the function.

    Raises
    ------
    ParamsError
        When the spec does not describe this network's tensors.
    SpecError
        When a permutation that the spec allows changes the outputs, naming the groups at fault.
    """
    spec.check(_tensors(model), "model")
    prover = Prover(model, as_inputs(example_inputs))
    if _fails(spec, prover, None):
        found = guilty(partial(_fails, spec, prover), list(spec.groups)) or list(spec.groups)
        raise SpecError(
            f"groups {found} change the outputs (relative error {prover.error(spec, found):.1e}, expected below "
            f"{prover.tolerance:.0e}); correct their segments or leave them out, or derive the spec by permutation_spec"
        )


def derive(model: nn.Module, inputs: Inputs, *, pin: Iterable[str] = ()) -> tuple[PermutationSpec, tuple[bool, ...]]:
    """The spec that tracing finds, not yet proven, and the modes (training or not) that it was traced in.

    Training mode is traced as well when evaluation leaves parameters unused: auxiliary heads are trained too.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"model is a {type(model).__name__}, expected a module; pass the network itself, Net()")
    structure = Structure()
    state = _tensors(model)
    first_name = aliases(model)
    own = {name for name, value in state.items() if first_name.get(name, name) == name and value.ndim}
    modes: tuple[bool, ...] = (False,)
    unused = ""
    used = label_graph(export(model, inputs, is_plain), model, structure)
    if own - used:
        try:
            used |= label_graph(export(model, inputs, is_plain, training=True), model, structure)
            modes, unused = (False, True), "not used by the forward pass"
        except TraceError:
            unused = "not used in evaluation mode, and training mode cannot be traced with these inputs"
    structure.operator = structure.module = ""
    for name in sorted(own - used):
        for dim, size in enumerate(state[name].shape):
            structure.pin(structure.axis(name, dim, size), unused)
    _pin_named(structure, state, first_name, pin)
    buffers = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))
    return build_spec(structure, state, first_name, buffers), modes


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what is no tensor."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _pin_named(structure: Structure, state: dict[str, Tensor], first_name: dict[str, str], pin: Iterable[str]) -> None:
    for entry in [pin] if isinstance(pin, str) else pin:
        name, _, axis = entry.partition(":")
        if name not in state:
            raise SpecError(f"pin {entry!r}: the network has no tensor {name!r}; its names are those of state_dict()")
        dims = range(state[name].ndim)
        if axis and (not axis.isdecimal() or int(axis) not in dims):
            raise SpecError(f"pin {entry!r}: {name!r} has axes {list(dims)}, not {axis!r}")
        source = first_name.get(name, name)
        for dim in [int(axis)] if axis else dims:
            structure.pin(structure.axis(source, dim, state[name].shape[dim]), "pinned by the user")


# ----------------------------------------------------------------------------------------------------------- proof


def prove(spec: PermutationSpec, prover: Prover) -> PermutationSpec:
    """Pin the groups that change the outputs, until none is left that does."""
    while spec.groups and _fails(spec, prover, None):
        found = guilty(partial(_fails, spec, prover), list(spec.groups))
        for name in found or list(spec.groups):
            spec = without(spec, name, "fails the numerical proof")
    return spec


def _fails(spec: PermutationSpec, prover: Prover, chosen: Collection[str] | None) -> bool:
    return any(not prover.error(spec, chosen) <= prover.tolerance for _ in range(_DRAWS))


def without(spec: PermutationSpec, group: str, reason: str) -> PermutationSpec:
    """The same spec with one group pinned; units of a nested group still follow their blocks.

    Groups nested in `group` are pinned with it: their blocks have nothing to follow.
    """
    if group not in spec.groups:
        return spec
    for child in spec.children(group):
        spec = without(spec, child, reason)
    parent = spec.groups[group].parent
    pins = tuple(Pin(tensor, axis, reason) for tensor, axis in spec.members(group))
    groups = {name: value for name, value in spec.groups.items() if name != group}
    tensors = {name: _freed(value, group, parent, spec) for name, value in spec.tensors.items()}
    return PermutationSpec(groups, tensors, spec.pins + pins)


def _freed(tensor: TensorSpec, group: str, parent: str | None, spec: PermutationSpec) -> TensorSpec:
    def axis(segments: Axis) -> Axis:
        kept = []
        for segment in segments:
            if group not in segment.groups:
                kept.append(segment)
            elif segment.slots == group:
                kept.append(replace(segment, slots=""))
            elif segment.slots:
                kept.append(_by_slots(segment, spec.groups[segment.slots].size))
            elif parent is not None:
                kept.append(Segment(parent, segment.positions.reshape(spec.groups[parent].size, -1)))
        return tuple(kept)

    return replace(tensor, axes=tuple(axis(segments) for segments in tensor.axes))


def _by_slots(segment: Segment, size: int) -> Segment:
    """The same coordinates as units of the group of the slots alone, which has `size` units."""
    blocks = segment.positions.reshape(size // segment.inner, -1, segment.inner)
    return Segment(segment.slots, blocks.swapaxes(1, 2).reshape(size, -1))
