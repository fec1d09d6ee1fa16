"""Branches, masks and attention masks in a trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl import check_invariance, permutation_spec
from c2m3_fl.errors import TraceError
from c2m3_fl.network.calibration import as_batch
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.program import Walk

INPUTS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
ROWS = torch.tensor([True, False, True, True, False])


class Branch(nn.Module):
    """A layer is taken, or left out, by the sign of the inputs' sum."""

    def __init__(self, branch: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.last, self.branch = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2), branch

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.last(self.branch(x.sum() > 0, lambda h: self.inner(h).tanh(), lambda h: 2 * h, (hidden,)))


class Either(nn.Module):
    """One of two layers, by the sign of the inputs' sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.yes, self.no, self.last = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.last(torch.cond(x.sum() > 0, lambda h: self.yes(h).tanh(), lambda h: self.no(h).relu(), (hidden,)))


class Without(nn.Module):
    """A layer under `torch.no_grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.inner(self.first(x).relu())
        return self.last(hidden.relu())


class Rows(nn.Module):
    """The rows that a mask chooses: one that is given, or one that depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        hidden = self.first(x).relu()
        return self.last(hidden[hidden.sum(1) > hidden.mean() if rows is None else rows])


@pytest.mark.parametrize(
    ("network", "inputs", "groups"),
    [
        (Branch(torch.cond), (INPUTS,), {"first": 6}),
        (Either(), (INPUTS,), {"first": 6, "yes": 5}),
        (Without(), (INPUTS,), {"first": 6, "inner": 7}),
        (Rows(), (INPUTS,), {"first": 6}),
        (Rows(), (INPUTS, ROWS), {"first": 6}),
    ],
)
def test_branches_and_masks_of_rows_are_traced(
    network: nn.Module, inputs: tuple[Tensor, ...], groups: dict[str, int]
) -> None:
    spec = permutation_spec(network, inputs)
    assert {name: group.size for name, group in spec.groups.items()} == groups
    assert check_invariance(network, spec, inputs) < 1e-12
    held = CalibrationSet.of(network, example_inputs=inputs)
    (found,) = Walk(held.program, network.state_dict(), held.example).finish()
    with torch.no_grad():
        torch.testing.assert_close(found, network(*inputs))


def test_layers_inside_a_branch_are_operators_of_the_program() -> None:
    for network in (Branch(torch.cond), Without()):
        held = CalibrationSet.of(network, example_inputs=(INPUTS,))
        weights = [operator.weight for operator in held.program.operators]
        assert sorted(weights) == ["first.weight", "inner.weight", "last.weight"]


def test_a_program_takes_the_branch_that_its_inputs_choose() -> None:
    network = Branch(torch.cond)
    program = CalibrationSet.of(network, example_inputs=(INPUTS,)).program
    for sign in (1, -1):
        (found,) = Walk(program, network.state_dict(), as_batch((sign * INPUTS,))).finish()
        hidden = network.first(sign * INPUTS).relu()
        taken = network.inner(hidden).tanh() if sign * INPUTS.sum() > 0 else 2 * hidden
        torch.testing.assert_close(found, network.last(taken))


def test_advice_about_control_flow_is_given_only_where_it_helps() -> None:
    def by_value(condition: Tensor, yes: Callable[..., Tensor], no: Callable[..., Tensor], given: tuple[Tensor]):
        return yes(*given) if condition else no(*given)

    def by_numpy(condition: Tensor, yes: Callable[..., Tensor], no: Callable[..., Tensor], given: tuple[Tensor]):
        return torch.from_numpy(given[0].detach().numpy())

    with pytest.raises(TraceError, match="Control flow must not depend"):
        permutation_spec(Branch(by_value), INPUTS)
    with pytest.raises(TraceError, match=r"numpy.*Change that line"):
        permutation_spec(Branch(by_numpy), INPUTS)


class Language(nn.Module):
    """An embedding, one layer of PyTorch's encoder or decoder, and scores of tokens."""

    def __init__(self, *, decoder: bool) -> None:
        super().__init__()
        one, all_of = (
            (nn.TransformerDecoderLayer, nn.TransformerDecoder)
            if decoder
            else (nn.TransformerEncoderLayer, nn.TransformerEncoder)
        )
        layer = one(8, 2, 12, dropout=0.1, batch_first=True, norm_first=decoder)
        options = {} if decoder else {"enable_nested_tensor": False}
        self.embedding, self.layers, self.scores = nn.Embedding(10, 8), all_of(layer, 1, **options), nn.Linear(8, 10)
        self.decoder = decoder

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.embedding(tokens)
        more = (hidden,) if self.decoder else ()
        named = {"tgt_mask": mask} if self.decoder else {"mask": mask}
        return self.scores(self.layers(hidden, *more, **named))


@pytest.mark.parametrize("decoder", [False, True])
def test_a_causal_mask_is_a_mask_like_any_other(decoder: bool) -> None:
    network = Language(decoder=decoder)
    tokens = torch.randint(10, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    for inputs in ((tokens,), (tokens, mask)):
        spec = permutation_spec(network, inputs)
        assert spec.members("layers.layers.0.linear1")
        assert sum(group.parent is not None for group in spec.groups.values()) == (4 if decoder else 2)
    held = CalibrationSet.of(network.eval(), [(tokens, mask)], example_inputs=(tokens, mask))
    (found,) = Walk(held.programs[0], network.state_dict(), held.batches[0]).finish()
    torch.testing.assert_close(found, network(tokens, mask))
