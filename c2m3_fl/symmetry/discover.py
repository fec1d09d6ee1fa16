"""The permutation symmetries of a network: derived by tracing, proven on numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial

from torch import Tensor, nn

from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.errors import SpecError, TraceError
from c2m3_fl.network.calibration import ExampleInputs, Inputs, as_inputs
from c2m3_fl.network.calls import Outputs, choose_outputs
from c2m3_fl.network.exporting import aliases, export
from c2m3_fl.symmetry.build_spec import build_spec
from c2m3_fl.symmetry.facts import Structure
from c2m3_fl.symmetry.pinning import without
from c2m3_fl.symmetry.proof import Prover, guilty
from c2m3_fl.symmetry.tracing import is_plain, label_graph

_DRAWS = 2  # a single random permutation of a wrong group may by chance be a symmetry


def permutation_spec(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    outputs: Outputs | None = None,
    pin: Iterable[str] = (),
) -> PermutationSpec:
    """Derive which units of a network may be permuted without changing its function.

    `torch.export` turns the network into a graph of ATen operators. One rule per operator says which axes carry the
    same units. Axes that no rule covers are pinned and listed in `spec.pins`. The spec is then checked on numbers: a
    group that changes the outputs is pinned as well.

    Parameters
    ----------
    model : nn.Module
        The network; neither its parameters nor its modes are changed.
    example_inputs : Tensor, tuple or dict
        Arguments of one call: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
    outputs : str, int or sequence of them, optional
        The outputs that the caller reads, by key, field or place: ``"logits"``. By default all tensors among them.
    pin : iterable of str
        Parameters that must stay: ``"conv1.weight"``, or one axis of one, ``"conv1.weight:1"``.

    Returns
    -------
    PermutationSpec
        The groups, where their units are, and every pinned axis with its reason. ``print`` shows all of it.

    Raises
    ------
    TraceError
        When the network cannot be called with the example inputs, or `torch.export` refuses it.
    SpecError
        When `pin` names a tensor or an axis that the network does not have.
    ConfigError
        When `outputs` names an output that the network does not have.

    Examples
    --------
    The six hidden units of two layers form one group; inputs and outputs are pinned:

    >>> import torch
    >>> from torch import nn
    >>> from c2m3_fl import permutation_spec
    >>> network, inputs = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4)
    >>> spec = permutation_spec(network, inputs)
    >>> spec.groups
    {'0': Group(size=6, parent=None)}
    >>> spec.members("0")
    (('0.weight', 0), ('0.bias', 0), ('2.weight', 1))
    >>> [(pin.tensor, pin.axis, pin.reason) for pin in spec.pins][-1]
    ('2.bias', 0, 'network output')

    Units that another part of the program addresses by their index can be pinned by name:

    >>> permutation_spec(network, inputs, pin=["0.weight:0"]).groups
    {}

    A network whose control flow depends on values cannot be traced. The error names the line. Rewrite it:

    >>> class Branch(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(4, 2)
    ...
    ...     def forward(self, x):
    ...         return self.layer(x) if x.sum() > 0 else self.layer(-x)
    >>> permutation_spec(Branch(), inputs)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    c2m3_fl.errors.TraceError: torch.export cannot trace Branch ... use torch.where or torch.cond, ...
    >>> Branch.forward = lambda self, x: self.layer(torch.where(x.sum() > 0, x, -x))
    >>> permutation_spec(Branch(), inputs).groups  # inputs and outputs only: nothing may move
    {}
    """
    inputs, model = as_inputs(example_inputs), choose_outputs(model, outputs)
    spec, modes = derive(model, inputs, pin=pin)
    for training in modes:
        spec = prove(spec, Prover(model, inputs, training=training))
    return spec


def check_invariance(
    model: nn.Module,
    spec: PermutationSpec,
    example_inputs: ExampleInputs,
    *,
    outputs: Outputs | None = None,
    draws: int = 1,
    seed: int = 0,
) -> float:
    """Largest relative change of any output under random permutations of all groups at once.

    The comparison runs on a copy of the network in evaluation mode and in double precision (in single precision if
    the network requires it). Constant tensors (heads of zeros, layer scales, new BatchNorm statistics) are randomised.

    Parameters
    ----------
    model : nn.Module
        The network; it is not changed.
    spec : PermutationSpec
        The spec to check.
    example_inputs : Tensor, tuple or dict
        Arguments of one call: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
    outputs : str, int or sequence of them, optional
        The outputs that the caller reads, by key, field or place: ``"logits"``. By default all tensors among them.
    draws : int
        Number of random permutations.
    seed : int
        Seed of the permutations and of the randomised tensors.

    Returns
    -------
    float
        Rounding stays below 1e-9 in double and below 1e-4 in single precision. Infinite if all outputs are zero or
        not finite.

    Raises
    ------
    ParamsError
        When the spec does not describe this network's tensors.
    TraceError
        When the network cannot be called with the example inputs.

    Examples
    --------
    A spec by hand for two layers, in which the columns of the second layer follow the hidden units:

    >>> import torch
    >>> from torch import nn
    >>> from c2m3_fl import Group, PermutationSpec, Segment, TensorSpec, check_invariance
    >>> network, inputs = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4)
    >>> units = (Segment.contiguous("hidden", 6),)
    >>> tensors = {
    ...     "0.weight": TensorSpec((6, 4), (units, ())),
    ...     "0.bias": TensorSpec((6,), (units,)),
    ...     "2.weight": TensorSpec((2, 6), ((), units)),
    ...     "2.bias": TensorSpec((2,), ((),)),
    ... }
    >>> check_invariance(network, PermutationSpec({"hidden": Group(6)}, tensors), inputs) < 1e-9
    True

    If the columns are forgotten, the outputs change. `require_invariance` names the group at fault; correct its
    segments, or derive the spec by `permutation_spec`:

    >>> tensors["2.weight"] = TensorSpec((2, 6), ((), ()))
    >>> wrong = PermutationSpec({"hidden": Group(6)}, tensors)
    >>> check_invariance(network, wrong, inputs) > 0.01
    True
    >>> from c2m3_fl.symmetry import require_invariance
    >>> require_invariance(network, wrong, inputs)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    c2m3_fl.errors.SpecError: groups ['hidden'] change the outputs (relative error ...); correct their segments ...
    """
    spec.check(_tensors(model), "model")
    prover = Prover(choose_outputs(model, outputs), as_inputs(example_inputs), seed=seed)
    return max(prover.error(spec) for _ in range(draws))


def require_invariance(model: nn.Module, spec: PermutationSpec, example_inputs: ExampleInputs) -> None:
    """Accept a spec written by hand only if it fits the network and all of its groups preserve the function.

    Parameters
    ----------
    model : nn.Module
        The network; it is not changed.
    spec : PermutationSpec
        The spec to check.
    example_inputs : Tensor, tuple or dict
        Arguments of one call, as for `check_invariance`.

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
    """The spec that tracing finds, before any check on numbers, and the modes (training or not) of the traces.

    If evaluation mode leaves parameters unused, training mode is traced as well: it runs auxiliary heads.
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
    """The tensors of the state dict; other entries are left out."""
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
    """Pin groups until no remaining group changes the outputs."""
    while spec.groups and _fails(spec, prover, None):
        found = guilty(partial(_fails, spec, prover), list(spec.groups))
        for name in found or list(spec.groups):
            spec = without(spec, name, "fails the numerical proof")
    return spec


def _fails(spec: PermutationSpec, prover: Prover, chosen: Collection[str] | None) -> bool:
    return any(not prover.error(spec, chosen) <= prover.tolerance for _ in range(_DRAWS))
