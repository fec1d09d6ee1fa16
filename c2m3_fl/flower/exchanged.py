"""Partial exchange: clients send some tensors of the state dict and keep the others.

What a client keeps stays in the order of its units, which nobody else sees. A group of units may therefore move only
where all tensors that carry it are exchanged.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import replace
from logging import INFO

from flwr.supercore import log

from c2m3_fl.core.spec import PermutationSpec, refuse_rotations
from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.aligning.memory import Memory
from c2m3_fl.flower.setup import Setup

_ADAPTERS = ("lora_", "ia3_")  # how PEFT's containers of one tensor per adapter begin


def restrict(spec: PermutationSpec, names: Iterable[str]) -> PermutationSpec:
    """The symmetries that the tensors of some names have by themselves.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    names : iterable of str
        The tensors that are exchanged, all of them the network's.
    """
    names = set(names)
    if not names >= spec.tensors.keys():
        refuse_rotations(spec, "exchange of a part of the state dict")
    kept = set(spec.groups)
    for name, tensor in spec.tensors.items():
        if name not in names:
            kept -= {group for _, segment in tensor.segments for group in segment.groups}
    while True:  # groups that move each other's units stay or go together
        linked = {name for name in kept if (parent := spec.groups[name].parent) is not None and parent not in kept}
        linked |= {each.parent for name, each in spec.groups.items() if each.parent is not None and name not in kept}
        for tensor in spec.tensors.values():
            for _, segment in tensor.segments:
                if not kept.issuperset(segment.groups):
                    linked |= set(segment.groups)
        if not kept & linked:
            break
        kept -= linked
    tensors = {
        name: replace(
            spec.tensors[name],
            axes=tuple(
                tuple(segment for segment in axis if kept.issuperset(segment.groups))
                for axis in spec.tensors[name].axes
            ),
        )
        for name in spec.tensors
        if name in names
    }
    pins = tuple(pin for pin in spec.pins if pin.tensor in names)
    return PermutationSpec({name: group for name, group in spec.groups.items() if name in kept}, tensors, pins)


def renamed(spec: PermutationSpec, names: Mapping[str, str]) -> PermutationSpec:
    """The same symmetries, its tensors under other names.

    Parameters
    ----------
    spec : PermutationSpec
        Of some tensors.
    names : mapping of str to str
        From the other names, in the order that they are to have, to those in the spec.
    """
    others = {own: other for other, own in names.items()}
    pins = tuple(replace(pin, tensor=others[pin.tensor]) for pin in spec.pins)
    return PermutationSpec(spec.groups, {other: spec.tensors[own] for other, own in names.items()}, pins)


def model_names(names: Iterable[str], model: Collection[str]) -> dict[str, str] | None:
    """The model's name of every tensor, by the name that clients send it under; None where one is not the model's.

    These are the names of the model's state dict, or those of PEFT's `get_peft_model_state_dict`, which leaves out the
    name of the adapter: ``q.lora_A.weight`` for ``q.lora_A.default.weight``, ``head.weight`` for
    ``head.modules_to_save.default.weight``.

    Parameters
    ----------
    names : iterable of str
        What clients send.
    model : collection of str
        The names of the model's state dict.

    Raises
    ------
    ConfigError
        Where the names are those of several adapters of the model.
    """
    names = list(names)
    short: dict[str, dict[str, str]] = {}
    for name in model:
        for adapter, without in _without_adapter(name):
            short.setdefault(adapter, {})[without] = name
    fitting = {}
    for adapter, known in {"": {}, **short}.items():
        found = {name: name if name in model else known.get(name, "") for name in names}
        if all(found.values()):
            fitting[adapter] = found
    if "" in fitting:
        return fitting[""]
    if len(fitting) > 1:
        raise ConfigError(
            f"{names[:2]} … are tensors of the adapters {list(fitting)} of the model: exchange them under the names of "
            "the model's state dict"
        )
    return next(iter(fitting.values()), None)


def _without_adapter(name: str) -> Iterator[tuple[str, str]]:
    """The adapters that a tensor may be of, with the name that PEFT gives it then."""
    parts = name.split(".")
    for index in range(1, len(parts)):
        kind, adapter, rest = parts[index - 1], parts[index], parts[index + 1 :]
        if kind == "modules_to_save":
            yield adapter, ".".join([*parts[: index - 1], *rest])
        elif kind == "lora_magnitude_vector" and rest == ["weight"]:
            yield adapter, ".".join(parts[:index])
        elif kind.startswith(_ADAPTERS) and len(rest) < 2:
            yield adapter, ".".join([*parts[:index], *rest])


def exchanging(whole: Setup, names: Collection[str]) -> Setup:
    """What a strategy is built from where clients send the tensors of some names only; says so at INFO.

    Nothing is recalibrated: the server does not have the networks that the clients run.

    Parameters
    ----------
    whole : Setup
        For clients that send the whole state dict; itself where they do.
    names : collection of str
        The tensors that are exchanged, in the order in which they are sent; see `model_names`.

    Raises
    ------
    ConfigError
        For names that the model does not have, for none, and with a recalibration that was asked for by name.
    """
    tensors = whole.spec.tensors
    known = model_names(names, tensors)
    if known is None or not names:
        strange = [name for name in names if model_names([name], tensors) is None]
        raise ConfigError(
            f"exchanged has {strange[:5] or 'no names'}, expected some of the model's: {list(tensors)[:5]} …"
        )
    if len(names) == len(tensors):
        return whole
    asked = whole.asks + (["recalibrate"] if whole.recalibration is not None else [])
    if asked:
        raise ConfigError(
            f"{asked[0]} needs the whole model, and the clients exchange {len(names)} of its {len(tensors)} tensors: "
            f"leave {asked[0]} out"
        )
    spec = renamed(restrict(whole.spec, known.values()), known)
    aligner = copy(whole.aligner)
    aligner.second_start = None  # it runs the networks
    aligner.spec, aligner.memory = spec, Memory(spec, whole.aligner.memory.limit)
    log(
        INFO,
        "\t> the clients exchange %d of %d tensors: %d of %d groups of units are in those alone and may move%s",
        len(names),
        len(tensors),
        len(spec.groups),
        len(whole.spec.groups),
        "; nothing is recalibrated" if whole.calibrated else "",
    )
    return replace(
        whole,
        spec=spec,
        aligner=aligner,
        data=replace(whole.data, batches=()),
        statistics=None,
        decides=False,
        head=None,
        offered=False,
        judge=None,
        names=known,
    )
