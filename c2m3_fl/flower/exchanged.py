"""Partial exchange: clients send some tensors of the state dict and keep the others.

What a client keeps stays in the order of its units, which nobody else sees. A group of units may therefore move only
where all tensors that carry it are exchanged.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from dataclasses import replace
from logging import INFO

from flwr.supercore import log

from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.memory import Memory
from c2m3_fl.flower.setup import Setup


def restrict(spec: PermutationSpec, names: Collection[str]) -> PermutationSpec:
    """The symmetries that the tensors of some names have by themselves.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    names : collection of str
        The tensors that are exchanged, all of them the network's.
    """
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


def exchanging(whole: Setup, names: Collection[str]) -> Setup:
    """What a strategy is built from where clients send the tensors of some names only; says so at INFO.

    Nothing is recalibrated: the server does not have the networks that the clients run.

    Parameters
    ----------
    whole : Setup
        For clients that send the whole state dict; itself where they do.
    names : collection of str
        The tensors that are exchanged.

    Raises
    ------
    ConfigError
        For names that the model does not have, for none, and with a recalibration that was asked for by name.
    """
    tensors = whole.spec.tensors
    strange = [name for name in names if name not in tensors]
    if strange or not names:
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
    spec = restrict(whole.spec, names)
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
    )
