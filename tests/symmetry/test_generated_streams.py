"""Networks nobody wrote whose groups are known: found, exact, merged with permuted copies, told from wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from c2m3_fl import merge
from c2m3_fl.core.permutation import apply
from c2m3_fl.core.spec import Axis, Group, Params, PermutationSpec, Segment
from c2m3_fl.errors import SpecError
from c2m3_fl.network.calibration import as_inputs
from c2m3_fl.network.exporting import aliases, mode
from c2m3_fl.symmetry.discover import derive, require_invariance
from c2m3_fl.symmetry.moves import stirring
from c2m3_fl.symmetry.proof import Prover
from tests.symmetry.generated_streams import PATTERNS, Stream, streams
from tests.symmetry.generated_ties import TIES, Block


def found(stream: Stream) -> PermutationSpec:
    """The spec by the rules alone: the groups that a reader expects, which pass the proof in both modes."""
    spec, modes = derive(stream.network, as_inputs(stream.inputs))
    assert sorted(group.size for group in spec.groups.values()) == stream.sizes, spec
    for training in modes:
        prover = Prover(stream.network, as_inputs(stream.inputs), training=training)
        assert prover.error(spec) < 1e-9
        assert prover.hidden_error(spec) < 1e-9
    return spec


def outputs(stream: Stream, params: Params, *, training: bool) -> Tensor:
    """What the network computes with other parameters, in double precision."""
    first = aliases(stream.network)
    own = {name: x.clone() for name, x in params.items() if first.get(name, name) == name}
    own = {name: x.double() if x.is_floating_point() else x for name, x in own.items()}
    with torch.no_grad(), mode(stream.network, training=training):
        result: Tensor = functional_call(stream.network, own, (stream.inputs.double(),))
    return result


def same(stream: Stream, params: Params) -> None:
    for training in (False, True):
        one, other = (outputs(stream, x, training=training) for x in (params, stream.network.state_dict()))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def wrong_specs(stream: Stream, spec: PermutationSpec) -> tuple[list[PermutationSpec], list[PermutationSpec]]:
    """Specs that forget one axis of a group, and specs that let an axis move that must stay."""
    first = aliases(stream.network)
    names: dict[str, list[str]] = {}
    for name in spec.tensors:
        names.setdefault(first.get(name, name), []).append(name)

    def with_axis(name: str, at: int, axis: Axis, groups: dict[str, Group]) -> PermutationSpec:
        changed = {}
        for one in names[name]:
            old = spec.tensors[one]
            changed[one] = replace(old, axes=(*old.axes[:at], axis, *old.axes[at + 1 :]))
        return replace(spec, groups=groups, tensors={**spec.tensors, **changed})

    forgotten, free = [], []
    for name in names:
        tensor = spec.tensors[name]
        for at, (size, axis) in enumerate(zip(tensor.shape, tensor.axes, strict=True)):
            for group in dict.fromkeys(one for segment in axis for one in segment.groups):
                kept = tuple(segment for segment in axis if group not in segment.groups)
                forgotten.append(with_axis(name, at, kept, dict(spec.groups)))
            if not axis and size > 1 and not tensor.buffer:
                units = (Segment.contiguous("wrong", size),)
                free.append(with_axis(name, at, units, {**spec.groups, "wrong": Group(size)}))
    return forgotten, free


_SETTINGS = settings(deadline=None, print_blob=True, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def _laws(stream: Stream, data: st.DataObject) -> None:
    spec = found(stream)
    params = {name: value.detach().clone() for name, value in stream.network.state_dict().items()}
    moved = apply(spec, stirring(spec, torch.Generator().manual_seed(0)), params)
    same(stream, moved)
    merged = merge(stream.network, [params, moved], spec=spec, example_inputs=stream.inputs, basis=0)
    same(stream, merged.state_dict)
    for wrong in wrong_specs(stream, spec):
        with pytest.raises(SpecError, match=r"change the outputs or results inside|cannot be proven"):
            require_invariance(stream.network, data.draw(st.sampled_from(wrong)), stream.inputs)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(_SETTINGS, max_examples=3)
@given(data=st.data())
def test_laws_of_generated_streams(pattern: str, data: st.DataObject) -> None:
    _laws(data.draw(streams(pattern)), data)


@pytest.mark.parametrize("tie", TIES, ids=lambda tie: tie.__name__)
def test_every_tie_gives_the_groups_that_a_reader_expects(tie: Callable[[int], Block]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = tie(6)
        network = nn.Sequential(nn.Linear(3, 6), block, nn.LayerNorm(6), nn.Linear(6, 2))
        found(Stream(network.eval(), torch.randn(4, 3), sorted([*block.sizes, 6])))


@pytest.mark.slow
@settings(_SETTINGS, max_examples=40)
@given(data=st.data())
def test_laws_of_many_generated_streams(data: st.DataObject) -> None:
    _laws(data.draw(streams()), data)
