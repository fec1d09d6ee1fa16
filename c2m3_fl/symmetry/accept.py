"""Which groups of a spec the numerical proof accepts, and how far it can see."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.errors import SpecError
from c2m3_fl.symmetry.differences import guilty
from c2m3_fl.symmetry.moves import Carrier
from c2m3_fl.symmetry.pinning import without
from c2m3_fl.symmetry.proof import VISIBLE, Prover

UNSEEN = "cannot be proven with these inputs"


def prove(spec: PermutationSpec, *provers: Prover) -> PermutationSpec:
    """Pin groups that change the outputs, or anything inside, and those of which a wrong permutation would not show."""
    for prover in provers:
        while spec.groups and prover.fails(spec):
            found = guilty(partial(prover.fails, spec), list(spec.groups))
            for name in found or list(spec.groups):
                spec = without(spec, name, "fails the numerical proof")
    for name in unseen(spec, provers):
        spec = without(spec, name, UNSEEN)
    return spec


def require(spec: PermutationSpec, provers: Sequence[Prover]) -> None:
    """Refuse a spec unless all of its groups are proven.

    Raises
    ------
    SpecError
        When a permutation that the spec allows changes the outputs, or anything inside, or when a wrong permutation
        would not show, naming the groups at fault.
    """
    for prover in provers:
        if prover.fails(spec):
            found = guilty(partial(prover.fails, spec), list(spec.groups)) or list(spec.groups)
            error = max(prover.error(spec, found) if prover.tells else 0.0, prover.hidden_error(spec, found))
            raise SpecError(
                f"groups {found} change the outputs or results inside the network (relative error {error:.1e}, "
                f"expected below {prover.tolerance:.0e}); correct their segments or leave them out, or derive the spec "
                "by permutation_spec"
            )
    lost = unseen(spec, provers)
    if lost:
        places = sorted({f"{tensor}:{axis}" for name in lost for tensor, axis in lost[name]})
        raise SpecError(
            f"groups {list(lost)} cannot be proven with these inputs: a wrong permutation of {places[:5]} alone would "
            "change no output and nothing inside the network; pass inputs that reach these tensors, or leave the "
            "groups out"
        )


def unseen(
    spec: PermutationSpec, provers: Sequence[Prover], chosen: Collection[str] | None = None
) -> dict[str, list[Carrier]]:
    """The groups, all or `chosen`, of which a wrong permutation would not show, with the carriers that hide it."""
    seen: dict[str, dict[Carrier, float]] = {}
    for prover in provers:
        for name, changes in prover.power(spec, chosen).items():
            best = seen.setdefault(name, {})
            for carrier, change in changes.items():
                best[carrier] = max(best.get(carrier, 0.0), change / prover.tolerance)
    if not any(prover.sees for prover in provers):
        return {name: list(spec.members(name)) for name in spec.groups if chosen is None or name in chosen}
    hidden = {name: [one for one, ratio in best.items() if ratio < VISIBLE] for name, best in seen.items()}
    return {name: places for name, places in hidden.items() if places}


class Invariance(float):
    """The largest relative change of any output: a number, and what the check could have seen.

    Attributes
    ----------
    power : mapping of str to float
        For every group, the smallest change, of an output or of a result inside the network, that a wrong permutation
        of one axis alone would cause. Below 100 times the tolerance (1e-7 in double precision) nothing is proven.
        Groups on a single axis have no entry.
    """

    power: Mapping[str, float]

    def __new__(cls, change: float, power: Mapping[str, float]) -> Invariance:
        """A number with attributes."""
        made = super().__new__(cls, change)
        made.power = power
        return made


def smallest(power: Mapping[str, Mapping[Carrier, float]], chosen: Collection[str]) -> dict[str, float]:
    """The smallest change of each group, in the order of the groups."""
    return {name: min(power[name].values()) for name in chosen if name in power}
