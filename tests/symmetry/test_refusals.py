"""What cannot be traced is refused with its reason and a remedy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.errors import ConfigError, TraceError
from c2m3_fl.symmetry.discover import check_invariance, permutation_spec
from tests.symmetry.families import build, noise, traced

WRONG = {
    "shape": (noise(2, 5), r"float32 of shape \(2, 5\)"),
    "type": (torch.ones(2, 3, 4, dtype=torch.int64), r"int64 of shape \(2, 3, 4\)"),
    "number": ((noise(2, 12), noise(2, 12)), r"takes 2 positional arguments"),
    "keyword": ({"pixels": noise(2, 12)}, r"pixels = float32 of shape \(2, 12\)"),
    "nothing": (None, r"NoneType"),
}


@pytest.mark.parametrize(("inputs", "named"), WRONG.values(), ids=WRONG.keys())
def test_inputs_that_the_network_does_not_take_are_named_with_a_remedy(inputs: object, named: str) -> None:
    message = rf"^Sequential cannot be called with the example inputs, .*{named}(?s:.*)Pass the arguments of one call"
    with pytest.raises(TraceError, match=message) as refused:
        permutation_spec(build("mlp"), inputs)
    assert "Control flow" not in str(refused.value)
    with pytest.raises(TraceError, match=message):
        check_invariance(build("mlp"), traced("mlp").spec, inputs)


def test_a_class_in_place_of_a_network_is_refused() -> None:
    with pytest.raises(TraceError, match=r"model is a type, expected a module"):
        permutation_spec(nn.Identity, noise(2, 4))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.a(x)
        return -self.a(x)


def test_control_flow_on_data_is_refused_with_its_line_and_a_remedy() -> None:
    line = Branching.forward.__code__.co_firstlineno + 1
    with pytest.raises(TraceError, match=rf"test_refusals\.py:{line}.*torch\.where"):
        permutation_spec(Branching(), noise(2, 4))


def test_a_name_that_the_exporter_keeps_to_itself_is_refused_with_a_remedy() -> None:
    class Books(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)
            self.register_buffer("code", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.code.add_(1)
            return self.a(x) * self.code

    with pytest.raises(TraceError, match=r"'code' already exists.* rename the tensor"):
        permutation_spec(Books(), noise(2, 4))


def test_the_exporter_prints_nothing_when_it_refuses(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TraceError):
        permutation_spec(Branching(), noise(2, 4))
    assert capfd.readouterr() == ("", "")


def test_rotations_are_asked_for_by_a_bool() -> None:
    with pytest.raises(ConfigError, match="rotations is 'no', expected True or False"):
        permutation_spec(build("mlp"), noise(2, 12), rotations="no")  # type: ignore[arg-type]  # that is the point
