"""The registry of operator rules: a rule maps the labels of an operator's inputs to those of its outputs.

A rule is called with a `Call` and with the operator's own arguments, tensors replaced by their `Labels`. If an
operator has no rule, its inputs are pinned and the pins name it (`unknown`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from c2m3_fl.errors import SpecError
from c2m3_fl.symmetry.facts import Atoms, Structure
from c2m3_fl.symmetry.labels import Labels, Shape
from c2m3_fl.symmetry.unit_labels import in_order, targets

Argument = Any  # labels, numbers, strings, or lists of them
Result = Any  # labels, or a tuple of them for operators with several outputs
Rule = Callable[..., Result]
RuleT = TypeVar("RuleT", bound=Rule)

RULES: dict[str, Rule] = {}
INDEXING: set[str] = set()  # operators whose rule handles an index that points into units
_SAME = (
    "view reshape _unsafe_view flatten unflatten unsqueeze squeeze permute transpose swapaxes t mT movedim expand "
    "expand_as repeat tile repeat_interleave select slice narrow split split_with_sizes chunk unbind flip clone "
    "contiguous detach alias to _to_copy lift_fresh_copy"
)
SAME_ENTRIES = frozenset(f"aten.{name}" for name in _SAME.split())  # of an index, they return indices


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes
    ----------
    structure : Structure
        The object that takes the rule's facts.
    outputs : tuple of (tuple of int)
        Shapes of the tensors that the operator returns.
    values : mapping of int to ndarray
        Values of arguments that are known at tracing time (constant indices), by position.
    """

    structure: Structure
    outputs: tuple[Shape, ...]
    values: dict[int, Atoms]

    @property
    def shape(self) -> Shape:
        """Shape of the first output."""
        return self.outputs[0]


def rule(*names: str, indexing: bool = False) -> Callable[[RuleT], RuleT]:
    """Register a rule for operators and all their overloads.

    Parameters
    ----------
    names : str
        Names such as ``"aten.relu"``.
    indexing : bool
        Whether the rule handles an index that points into units (`Labels.points`). For all other operators, the units
        that an index points into are pinned: its numbers reveal their order.

    Raises
    ------
    SpecError
        When an operator has a rule already, naming both functions.

    Examples
    --------
    >>> @rule("mylib.double")
    ... def double(call, x):
    ...     return x  # every entry keeps its unit
    >>> _ = RULES.pop("mylib.double")
    """

    def register(function: RuleT) -> RuleT:
        for name in names:
            if name in RULES:
                raise SpecError(
                    f"operator {name!r} has the rule {_path(RULES[name])}, so {_path(function)} cannot be registered "
                    "for it; remove one of the two, or give the operator another name"
                )
            RULES[name] = function
            if indexing:
                INDEXING.add(name)
        return function

    return register


def _path(function: Rule) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def tensors(args: Iterable[Argument]) -> list[Labels]:
    """All labels among the arguments, also inside lists."""
    found: list[Labels] = []
    for value in args:
        if isinstance(value, Labels):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(tensors(value))
    return found


def expose(structure: Structure, x: Labels) -> Labels:
    """An index whose numbers are read: the units that it points into keep their order."""
    units = targets(structure, x)
    if units is not None:
        structure.pin(units, "its index is read as a number")
    return replace(x, points=None)


def unknown(call: Call, *args: Argument, form: str = "", **kwargs: Argument) -> Result:
    """The rule of operators without a rule, or without one for this form: all axes of the inputs are pinned."""
    for x in tensors([*args, *kwargs.values()]):
        in_order(call.structure, x, range(x.ndim), f"no rule for {call.structure.operator}{form}")
    return as_output([Labels.ordered(shape) for shape in call.outputs])


def as_output(values: list[Labels]) -> Result:
    """One output as itself, several as a tuple."""
    return values[0] if len(values) == 1 else tuple(values)
