"""A buffer about units is permuted with them, whatever its values; one that makes units of its own stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d

from c2m3_fl.symmetry.discover import permutation_spec
from tests.symmetry.checks import check, reasons
from tests.symmetry.families import noise


class HandNorm(nn.Module):
    """Normalisation written by hand, with running statistics that training updates."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(width)), nn.Parameter(torch.randn(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * mean)
                self.var = 0.9 * self.var + 0.1 * var
                self.steps += 1
        return (x - mean) / (var + 1e-5).sqrt() * self.scale + self.shift


class Averaged(nn.Module):
    """A layer beside a running average of its weight, and a centre of its outputs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.register_buffer("average", self.layer.weight.detach() + 0.1 * torch.randn(outputs, inputs))
        self.register_buffer("centre", torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (self.layer(x) - self.centre) + nn.functional.linear(x, self.average)


def frozen() -> nn.Module:
    norms = [FrozenBatchNorm2d(width) for width in (6, 5)]
    for buffer in (buffer for norm in norms for buffer in norm.buffers()):
        buffer.copy_(torch.rand(len(buffer)) + 0.5)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), norms[0], nn.ReLU(), nn.Conv2d(6, 5, 3), norms[1], nn.Flatten(), nn.Linear(20, 2)
    )


def by_hand() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 6), HandNorm(6), nn.ReLU(), nn.Linear(6, 5), HandNorm(5), nn.Linear(5, 2))
    for _ in range(3):
        network(torch.randn(8, 4))
    return network


def spectral(parametrise: Callable[[nn.Module], nn.Module], passes: int = 3) -> nn.Module:
    layers = [parametrise(layer) for layer in (nn.Conv2d(2, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(20, 4))]
    network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), nn.Flatten(), layers[2])
    for _ in range(passes):
        network(torch.randn(2, 2, 6, 6))
    return network


def pruned() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    prune.random_unstructured(network[2], "weight", 0.4)
    return network


NETWORKS = {
    "frozen statistics": (frozen, noise(2, 2, 6, 6)),
    "statistics by hand": (by_hand, noise(5, 4)),
    "running averages": (
        lambda: nn.Sequential(Averaged(4, 6), nn.ReLU(), Averaged(6, 5), nn.Linear(5, 2)),
        noise(3, 4),
    ),
    "spectral norm": (lambda: spectral(parametrizations.spectral_norm), noise(2, 2, 6, 6)),
    "spectral norm by a hook": (lambda: spectral(nn.utils.spectral_norm), noise(2, 2, 6, 6)),
    "spectral norm by a hook, before the first pass": (lambda: spectral(nn.utils.spectral_norm, 0), noise(2, 2, 6, 6)),
    "masks of pruning": (pruned, noise(3, 4)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*|.*spectral_norm.*:FutureWarning")
def test_buffers_with_content_move_with_their_units(name: str) -> None:
    check(*NETWORKS[name], 6, 5)


class Positions(nn.Module):
    """A stream of units to which fixed positions are added; the table may be longer than the inputs."""

    def __init__(self, length: int = 5) -> None:
        super().__init__()
        self.a, self.o, self.norm = nn.Linear(3, 6), nn.Linear(6, 2), nn.BatchNorm1d(6)
        self.register_buffer("places", torch.sin(torch.arange(length * 6.0)).view(length, 6))

    def forward(self, x: Tensor) -> Tensor:
        stream = (self.a(x) + self.places[: x.shape[1]]).tanh()
        return self.o(self.norm(stream.flatten(0, 1)).unflatten(0, stream.shape[:2]).mean(1))


def test_fixed_positions_move_with_the_stream_that_they_are_added_to() -> None:
    """The rows, one per place, stay; the columns carry the units of the embedding."""
    spec = check(Positions, noise(2, 5, 3), 6)
    assert spec.tensors["places"].axes[0] == ()


@pytest.mark.parametrize(("length", "counted"), [(5, True), (9, False)])
def test_a_fixed_table_has_a_say_in_matches_if_it_is_read_as_a_whole(length: int, counted: bool) -> None:
    """It is a parameter that training does not change; rows that are never read say nothing about the function."""
    spec = permutation_spec(Positions(length), noise(2, 5, 3))
    assert spec.tensors["places"].buffer != counted
    assert spec.tensors["norm.running_mean"].buffer
    assert spec.tensors["norm.running_var"].buffer


def test_averages_that_training_writes_have_no_say() -> None:
    class Following(Averaged):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                with torch.no_grad():
                    self.average.lerp_(self.layer.weight, 0.1)
            return super().forward(x)

    network = nn.Sequential(Following(4, 6), nn.ReLU(), nn.Linear(6, 2))
    spec = permutation_spec(network, noise(3, 4))
    assert spec.tensors["0.average"].buffer
    assert spec.groups["0.layer"].size == 6


def test_knots_that_a_buffer_holds_keep_their_order() -> None:
    """No layer computes the basis functions: the buffer itself makes them, and tells them apart."""

    class Splines(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(4, 6), nn.Linear(5, 2)
            self.register_buffer("knots", torch.linspace(-1, 1, 7))
            self.curves = nn.Parameter(torch.randn(5, 6, 7))

        def forward(self, x: Tensor) -> Tensor:
            basis = torch.exp(-(self.a(x).unsqueeze(-1) - self.knots).square())
            return self.o(torch.einsum("bik,oik->bo", basis, self.curves))

    spec = check(Splines, noise(3, 4), 5, 6)
    assert reasons(spec, "knots") == {"buffer with content of its own"}


def test_statistics_of_the_inputs_stay() -> None:
    """They are combined with ordered content."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]))
            self.a, self.o = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.a(x - self.mean).relu())

    spec = check(Scaled, noise(4, 3), 6)
    assert reasons(spec, "mean") == {"combined with ordered content"}


def test_a_mask_that_the_state_dict_holds_pins_units_because_another_network_may_hold_another() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(4, 6), nn.Linear(6, 2)
            self.register_buffer("mask", torch.arange(6) < 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(torch.where(self.mask, self.a(x), 0.0))

    assert reasons(check(Masked, noise(3, 4)), "mask") == {"holds integers, not units"}
