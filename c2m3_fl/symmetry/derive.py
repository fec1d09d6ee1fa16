"""The spec that tracing finds: the graphs of all settings with operators of their own, labelled and built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from c2m3_fl.core.axes import Kind
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.errors import SpecError, TraceError
from c2m3_fl.network.calibration import Inputs
from c2m3_fl.network.exporting import aliases, export
from c2m3_fl.symmetry.build_spec import build_spec
from c2m3_fl.symmetry.facts import Structure
from c2m3_fl.symmetry.proof_settings import ProofSetting, Survey, survey
from c2m3_fl.symmetry.tables import with_tables
from c2m3_fl.symmetry.tracing import is_plain, label_graph


@dataclass(frozen=True)
class Derivation:
    """What tracing found.

    Attributes
    ----------
    spec : PermutationSpec
        The spec, before any check on numbers.
    settings : tuple of ProofSetting
        Modes and batch sizes that run different operators.
    unused : tuple of str
        Parameters that no forward pass uses.
    kinds : mapping of str to Kind
        The groups that may be rotated, before any check on numbers; none unless rotations are asked for.
    """

    spec: PermutationSpec
    settings: tuple[ProofSetting, ...]
    unused: tuple[str, ...]
    kinds: Mapping[str, Kind]


def derive(model: nn.Module, inputs: Inputs, *, pin: Iterable[str] = ()) -> tuple[PermutationSpec, tuple[bool, ...]]:
    """The spec that tracing finds, before any check on numbers, and the modes (training or not) of the traces."""
    found = trace(model, inputs, pin=pin)
    return found.spec, tuple(setting.training for setting in found.settings if not setting.batch)


def trace(
    model: nn.Module, inputs: Inputs, *, pin: Iterable[str] = (), folded: frozenset[str] | None = None
) -> Derivation:
    """Trace every mode and batch size that runs operators of its own.

    Where rotations are asked for, `folded` has the scales of norms that are folded.

    Training mode may run auxiliary heads. What cannot be traced apart from the example in evaluation mode is left to
    the numerical proof.

    Raises
    ------
    TraceError
        When the network cannot be called with the inputs, or `torch.export` refuses it.
    SpecError
        When `pin` names a tensor or an axis that the network does not have.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"model is a {type(model).__name__}, expected a module; pass the network itself, Net()")
    structure = Structure(folded)
    state = tensors(model)
    first_name = aliases(model)
    own = {name for name, value in state.items() if first_name.get(name, name) == name and value.ndim}
    used = label_graph(export(model, inputs, is_plain), model, structure)
    found = survey(model, inputs)
    trained = any(word.startswith("training") for words in found.covered for word in words)
    for setting in found.distinct[1:]:
        try:
            used |= label_graph(export(model, setting.inputs, is_plain, training=setting.training), model, structure)
        except TraceError:
            trained = trained and not setting.training
    unused = (
        "not used by the forward pass"
        if trained
        else "not used in evaluation mode, and training mode cannot be traced with these inputs"
    )
    structure.operator = structure.module = ""
    for name in sorted(own - used):
        for dim, size in enumerate(state[name].shape):
            structure.pin(structure.axis(name, dim, size), unused)
    _pin_named(structure, state, first_name, pin)
    buffers = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))
    spec, kinds = build_spec(structure, state, first_name, buffers)
    if trained:
        spec = with_tables(spec, structure.written)
    params = dict(model.named_parameters(remove_duplicate=False))
    left_out = tuple(sorted((own - used) & params.keys()))
    return Derivation(replace(spec, proven=_words(found)), found.distinct, left_out, kinds)


def _words(found: Survey) -> tuple[str, ...]:
    """Modes and batch sizes that the traces stand for."""
    return tuple(dict.fromkeys(word for words in found.covered for word in words))


def tensors(model: nn.Module) -> dict[str, Tensor]:
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
