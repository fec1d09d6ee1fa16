"""Groups that rotate: from the groups that tracing found to a spec that is proven on numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from c2m3_fl.core.axes import Kind
from c2m3_fl.core.spec import Params, PermutationSpec, Pin
from c2m3_fl.symmetry.accept import unseen
from c2m3_fl.symmetry.differences import guilty
from c2m3_fl.symmetry.folding import Folding
from c2m3_fl.symmetry.proof import Prover
from c2m3_fl.symmetry.proof_settings import ProofSetting

_ONE, _ZERO = "one after its norm is folded", "zero after its norm is folded"


def with_rotations(spec: PermutationSpec, kinds: Mapping[str, Kind], folding: Folding) -> PermutationSpec:
    """The spec of folded params: some groups rotate, and the ones and zeros that are left of folded norms stay.

    Parameters
    ----------
    spec : PermutationSpec
        A spec of permutations alone.
    kinds : mapping of str to Kind
        The groups that rotate; those that the spec lacks are left out.
    folding : Folding
        The norms that are folded.
    """
    turning = {name: kind for name, kind in kinds.items() if name in spec.groups}
    groups = {name: replace(group, kind=turning.get(name, group.kind)) for name, group in spec.groups.items()}
    still = {norm.scale: _ONE for norm in folding.norms}
    still |= {norm.shift: _ZERO for norm in folding.norms if norm.folds_shift}
    reasons = {name: reason for first, reason in still.items() for name in folding.names[first]}
    tensors, pins = dict(spec.tensors), []
    for name, reason in reasons.items():
        tensor = tensors[name]
        if any(tensor.axes):
            tensors[name] = replace(tensor, axes=((),) * len(tensor.axes))
            pins += [Pin(name, dim, reason) for dim, axis in enumerate(tensor.axes) if axis]
    return replace(spec, groups=groups, tensors=tensors, pins=(*spec.pins, *pins))


def prover(model: nn.Module, setting: ProofSetting, folding: Folding | None, *, seed: int = 0) -> Prover:
    """A prover with generic parameters; for a spec with rotations, folded ones.

    There small matrices are enlarged: a network at its initial weights hardly depends on the inside of its heads.

    Parameters
    ----------
    model : nn.Module
        The network; not mutated.
    setting : ProofSetting
        How to run it.
    folding : Folding, optional
        The norms that are folded; None for a spec of permutations alone.
    seed : int
        Seed of parameters and moves.
    """
    matrices = {name for name, value in model.named_parameters(remove_duplicate=False) if value.ndim > 1}

    def prepared(params: Params) -> dict[str, Tensor]:
        if folding is None:
            return dict(params)
        return folding.fold({name: _enlarged(value) if name in matrices else value for name, value in params.items()})

    return Prover(model, setting.inputs, seed=seed, training=setting.training, prepared=prepared)


def _enlarged(matrix: Tensor) -> Tensor:
    """A matrix whose rows have a length of one or more, on average."""
    if not matrix.is_floating_point() or not matrix.any():
        return matrix
    length = (matrix.double().square().sum() / matrix.shape[0]).sqrt()
    return (matrix / length.clamp_max(1.0)).to(matrix.dtype)


def prove_rotations(
    spec: PermutationSpec, kinds: Mapping[str, Kind], folding: Folding, provers: Sequence[Prover]
) -> PermutationSpec:
    """Rotate the groups of a proven spec of which no rotation changes the outputs, and of which a wrong one would show.

    Parameters
    ----------
    spec : PermutationSpec
        A proven spec of permutations alone.
    kinds : mapping of str to Kind
        The groups that tracing found to be read by linear operators alone. The others, and those that fail, permute.
    folding : Folding
        The norms that are folded.
    provers : sequence of Prover
        Copies of the network with folded parameters.
    """
    turning = {name: kind for name, kind in kinds.items() if name in spec.groups}
    for prover in provers:
        while turning:
            rotated = with_rotations(spec, turning, folding)
            if not prover.fails(rotated, list(turning)):
                break
            wrong = guilty(partial(prover.fails, rotated), list(turning)) or list(turning)
            turning = {name: kind for name, kind in turning.items() if name not in wrong}
    rotated = with_rotations(spec, turning, folding)
    hidden = unseen(rotated, provers, turning) if turning else {}
    turning = {name: kind for name, kind in turning.items() if name not in hidden}
    return with_rotations(spec, turning, folding) if turning else spec
