from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.network.calibration import Batch
from c2m3_fl.network.program import Walk, export_program
from c2m3_fl.network.rows import (
    from_matrix,
    input_of,
    input_rows,
    output_rows,
    sample_positions,
    weight_matrix,
)


class _Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.weight


CASES = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "linear on sequences": (nn.Linear(6, 4), (5, 3, 6)),
    "product": (_Product(), (5, 3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (5, 4, 9)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2)), (5, 3, 7, 6)),
    "strided": (nn.Conv2d(3, 4, 3, stride=(2, 3), padding=(1, 2), dilation=(2, 1)), (5, 3, 9, 8)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, padding=1), (5, 6, 5, 5)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (5, 6, 5, 5)),
    "same": (nn.Conv2d(3, 4, (4, 3), padding="same"), (5, 3, 6, 6)),
    "valid": (nn.Conv2d(3, 4, 3, padding="valid"), (5, 3, 6, 6)),
    "conv3d": (nn.Conv3d(2, 4, 2, padding=1), (3, 2, 4, 3, 5)),
    "one image": (nn.Conv2d(3, 4, 3, padding=1), (3, 6, 6)),
}


@pytest.mark.parametrize("count", [7, 10**6])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_rows_times_matrix_are_the_outputs(case: str, count: int) -> None:
    module, shape = CASES[case]
    module = module.double()
    source = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    program = export_program(module, (source,))
    params = {name: value.detach() for name, value in module.state_dict().items()}

    (operator,) = program.operators
    with torch.no_grad():
        output = Walk(program, params, Batch((source,))).output(operator)
    weight = params[operator.weight]
    positions = sample_positions(operator, output, count, seed=1)
    rows = input_rows(operator, source, weight, output.shape, positions)
    matrix = weight_matrix(operator, weight)
    found = (rows @ matrix).movedim(0, 1).reshape(len(positions), -1)
    bias = params[operator.bias] if operator.bias else 0.0
    torch.testing.assert_close(found + bias, output_rows(operator, output, positions))
    assert torch.equal(from_matrix(operator, matrix, weight.shape), weight)
    nothing = input_rows(operator, source, weight, output.shape, positions[:0])
    assert nothing.shape == (len(matrix), 0, matrix.shape[1])


def test_positions_are_drawn_once_per_shape() -> None:
    module, shape = CASES["conv2d"]
    program = export_program(module.double(), (torch.randn(*shape, dtype=torch.float64),))
    (operator,) = program.operators
    output = torch.zeros(5, 4, 5, 5)
    drawn = sample_positions(operator, output, 20, seed=3)
    assert torch.equal(drawn, sample_positions(operator, output + 1, 20, seed=3))
    assert len(drawn.unique()) == 20
    assert not torch.equal(drawn, sample_positions(operator, output, 20, seed=4))


@pytest.mark.parametrize(("shape", "wanted"), [((3, 2), [0, 0, 1, 1, 2, 2]), ((2, 3), [0, 1, 2, 0, 1, 2])])
def test_positions_know_their_input(shape: tuple[int, ...], wanted: list[int]) -> None:
    assert input_of(torch.arange(6), shape, 3).tolist() == wanted


def test_windows_of_an_image_belong_to_it() -> None:
    assert input_of(torch.arange(6), (6,), 3).tolist() == [0, 0, 1, 1, 2, 2]
