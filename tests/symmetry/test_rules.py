"""The registry of operator rules: complete, without duplicates, open to operators of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.errors import SpecError
from c2m3_fl.symmetry import Labels, check_invariance, permutation_spec, rule, rules
from c2m3_fl.symmetry.rules import registry

_FILES = sorted(
    path.stem for path in Path(rules.__file__).parent.glob("*.py") if path.stem not in ("__init__", "registry")
)


@pytest.mark.parametrize("name", _FILES)
def test_every_file_of_rules_is_registered(name: str) -> None:
    assert any(function.__module__ == f"{rules.__name__}.{name}" for function in registry.RULES.values())


def test_every_rule_is_of_an_operator_that_torch_has() -> None:
    known = {name.partition(".")[0].replace("::", ".") for name in torch._C._dispatch_get_all_op_names()}
    assert not [name for name in registry.RULES if name.startswith("aten.") and name not in known]


def test_an_operator_with_two_rules_is_refused_naming_both() -> None:
    def other(call: object, x: Labels) -> Labels:
        return x

    before = dict(registry.RULES)
    with pytest.raises(SpecError, match=r"'aten.relu' has the rule .*elementwise\.elementwise, so .*other cannot"):
        rule("aten.relu")(other)
    assert before == registry.RULES


# --------------------------------------------------------------------------------------- the example of the page


@torch.library.custom_op("c2m3_example::soft_clip", mutates_args=())
def soft_clip(x: Tensor, limit: float) -> Tensor:
    """An operator that torch does not know: every entry between -limit and limit."""
    return limit * torch.tanh(x / limit)


@soft_clip.register_fake
def _(x: Tensor, limit: float) -> Tensor:
    return torch.empty_like(x)


class Net(nn.Module):
    """Two layers with the operator between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(soft_clip(self.first(x), 2.0))


@pytest.fixture
def registered() -> Iterator[None]:
    """The rule of the page `c2m3_fl/symmetry/README.md`, as long as a test runs."""

    @rule("c2m3_example.soft_clip")
    def entry_by_entry(call: registry.Call, x: Labels, limit: float) -> Labels:
        """Every entry keeps its unit."""
        return x

    yield
    del registry.RULES["c2m3_example.soft_clip"]


def test_without_a_rule_an_operator_pins_its_inputs_and_is_named() -> None:
    spec = permutation_spec(Net(), torch.zeros(3, 4))
    assert not spec.groups
    assert "no rule for c2m3_example.soft_clip" in {pin.reason for pin in spec.pins}


def test_a_form_that_a_rule_does_not_take_pins_its_inputs_and_is_named() -> None:
    @rule("c2m3_example.soft_clip")
    def for_pairs(call: registry.Call, x: Labels, limit: float) -> Labels:
        return Labels((x.shape[0], x.shape[2]))

    try:
        spec = permutation_spec(Net(), torch.zeros(3, 4))
    finally:
        del registry.RULES["c2m3_example.soft_clip"]
    assert not spec.groups
    assert "no rule for c2m3_example.soft_clip with these arguments" in {pin.reason for pin in spec.pins}


@pytest.mark.usefixtures("registered")
def test_a_rule_for_an_operator_of_ones_own_frees_its_units() -> None:
    model, inputs = Net(), torch.randn(3, 4)
    spec = permutation_spec(model, inputs)
    assert {name: group.size for name, group in spec.groups.items()} == {"first": 6}
    assert check_invariance(model, spec, inputs) < 1e-9


def test_a_rule_that_claims_too_much_is_pinned_by_the_proof() -> None:
    """Reversing the units is not entry by entry: the numbers say so."""

    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 6)
            self.second = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(reverse(self.first(x)))

    rule("c2m3_example.reverse")(lambda call, x: x)
    try:
        spec = permutation_spec(Reversed(), torch.randn(3, 4))
    finally:
        del registry.RULES["c2m3_example.reverse"]
    assert not spec.groups
    assert "fails the numerical proof" in {pin.reason for pin in spec.pins}


@torch.library.custom_op("c2m3_example::reverse", mutates_args=())
def reverse(x: Tensor) -> Tensor:
    """The units in the opposite order."""
    return x.flip(-1)


@reverse.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)
