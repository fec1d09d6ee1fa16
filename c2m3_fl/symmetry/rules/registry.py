"""The registry of operator rules: a rule maps the labels of an operator's inputs to those of its outputs.

A rule is called with a `Call` and with the operator's own arguments, tensors replaced by their `Labels`. If an
operator has no rule, its inputs are pinned and the pins name it (`unknown`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from c2m3_fl.errors import SpecError
from c2m3_fl.symmetry.facts import Atoms, Structure
from c2m3_fl.symmetry.unit_labels import Labels, Shape, in_order

Argument = Any  # labels, numbers, strings, or lists of them
Result = Any  # labels, or a tuple of them for operators with several outputs
Rule = Callable[..., Result]
RuleT = TypeVar("RuleT", bound=Rule)

RULES: dict[str, Rule] = {}


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


def rule(*names: str) -> Callable[[RuleT], RuleT]:
    """Register a rule for operators and all their overloads; `names` are like ``"aten.relu"``.

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


def unknown(call: Call, *args: Argument, **kwargs: Argument) -> Result:
    """The rule of operators without a rule: all axes of the inputs are pinned."""
    for x in tensors([*args, *kwargs.values()]):
        in_order(call.structure, x, range(x.ndim), f"no rule for {call.structure.operator}")
    return as_output([Labels.ordered(shape) for shape in call.outputs])


def as_output(values: list[Labels]) -> Result:
    """One output as itself, several as a tuple."""
    return values[0] if len(values) == 1 else tuple(values)
