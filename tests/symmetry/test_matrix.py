"""Operators on whole matrices, Fourier transforms and complex numbers: what moves, and the reason of what stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.symmetry.checks import check, reasons
from tests.symmetry.families import Inputs, Lambda, noise

Function = Callable[[nn.Module, Tensor], Tensor]


def weights(function: Function, **shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    """Layers `a` (4 → 6) and `o` (→ 2), and weights of any shapes in the module `w`."""

    def build() -> nn.Module:
        held = nn.ParameterDict({name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})
        return Lambda(
            lambda net, x: net.o(function(net, net.a(x).tanh())), a=nn.Linear(4, 6), o=nn.LazyLinear(2), w=held
        )

    def initialised() -> nn.Module:
        network = build()
        network(noise(3, 4))
        return network

    return initialised


class Dora(nn.Module):
    """A weight plus a product of low rank, normalised by rows, times a size per row."""

    def __init__(self, inputs: int, outputs: int, rank: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(rank, inputs)), nn.Parameter(torch.randn(outputs, rank))
        self.size = nn.Parameter(torch.rand(outputs) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight + self.b @ self.a
        scale = self.size / torch.linalg.norm(weight, dim=1)
        return functional.linear(x, weight * scale[:, None], self.layer.bias)


class Fourier(nn.Module):
    """A layer in the frequency domain with complex weights, beside a pointwise one."""

    def __init__(self, width: int = 5, modes: int = 3) -> None:
        super().__init__()
        self.modes, self.inward, self.outward = modes, nn.Linear(1, width), nn.Linear(width, 1)
        self.local, self.weight = nn.Conv1d(width, width, 1), nn.Parameter(torch.randn(width, width, modes, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x).transpose(1, 2)
        found = torch.fft.rfft(x)
        kept = torch.einsum("bim,iom->bom", found[..., : self.modes], torch.view_as_complex(self.weight))
        spread = functional.pad(torch.view_as_real(kept), (0, 0, 0, found.shape[-1] - self.modes))
        x = torch.fft.irfft(torch.view_as_complex(spread), n=x.shape[-1]) + self.local(x)
        return self.outward(x.relu().transpose(1, 2))


class Complex(nn.Module):
    """Complex weights between real layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(4, 6), nn.Linear(6, 2)
        self.z = nn.Parameter(torch.randn(6, 5, dtype=torch.complex64))
        self.y = nn.Parameter(torch.randn(5, 6, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.complex(self.a(x), torch.zeros(()).to(x)) @ self.z
        return self.o((h * h.abs() @ self.y).real)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tensordot": (weights(lambda net, h: torch.tensordot(h, net.w["v"], ([1], [1])).relu(), v=(5, 6)), (6, 5)),
    "inner": (weights(lambda net, h: torch.inner(h, net.w["v"]).relu(), v=(5, 6)), (6, 5)),
    "outer": (weights(lambda net, h: (h @ torch.outer(net.w["u"], net.w["v"])).relu(), u=(6,), v=(5,)), (6, 5)),
    "diag": (weights(lambda net, h: h @ torch.diag(net.w["v"]), v=(6,)), (6,)),
    "diag_embed": (weights(lambda net, h: (torch.diag_embed(h) @ net.w["v"]).relu().sum(1), v=(6, 5)), (6, 5)),
    "diagonal": (weights(lambda net, h: h * torch.diagonal(net.w["v"]), v=(6, 6)), (6,)),
    "diagonal in einsum": (weights(lambda net, h: torch.einsum("bi,ii->bi", h, net.w["v"]), v=(6, 6)), (6,)),
    "trace": (weights(lambda net, h: h * torch.trace(net.w["v"]), v=(6, 6)), (6, 6)),
    "cdist": (weights(lambda net, h: (-torch.cdist(h, net.w["v"])).exp(), v=(5, 6)), (6, 5)),
    "cosine": (
        weights(lambda net, h: functional.cosine_similarity(h[:, None], net.w["v"], dim=-1), v=(5, 6)), (6, 5),
    ),
    "distance": (weights(lambda net, h: functional.pairwise_distance(h, net.w["v"])[:, None], v=(6,)), (6,)),
    "Frobenius norm": (
        weights(lambda net, h: (h @ net.w["v"] / torch.linalg.matrix_norm(net.w["v"])).relu(), v=(6, 5)), (6, 5),
    ),
    "spectral norm": (
        weights(lambda net, h: (h @ net.w["v"] / torch.linalg.matrix_norm(net.w["v"], 2)).relu(), v=(6, 5)), (6, 5),
    ),
    "norm of all": (weights(lambda net, h: (h @ net.w["v"] / torch.linalg.norm(net.w["v"])).relu(), v=(6, 5)), (6, 5)),
    "inverse": (weights(lambda net, h: (h @ torch.linalg.inv(net.w["v"])).relu(), v=(6, 6)), (6, 6)),
    "inverse with a ridge": (
        weights(lambda net, h: (h @ torch.linalg.inv(net.w["v"].T @ net.w["v"] + torch.eye(6))).relu(), v=(5, 6)),
        (6, 5),
    ),
    "a weight around the identity": (weights(lambda net, h: (h @ (torch.eye(6) + net.w["v"])).relu(), v=(6, 6)), (6,)),
    "a scaled identity": (weights(lambda net, h: (h @ (2 * torch.eye(6) - net.w["v"])).relu(), v=(6, 6)), (6,)),
    "exponential": (weights(lambda net, h: (h @ torch.linalg.matrix_exp(0.1 * net.w["v"])).relu(), v=(6, 6)), (6,)),
    "kron": (weights(lambda net, h: (h @ torch.kron(net.w["u"], net.w["v"])).relu(), u=(6, 1), v=(1, 5)), (6, 5)),
    "bilinear form": (weights(lambda net, h: (h @ net.w["v"] * h).sum(-1, keepdim=True), v=(6, 6)), (6,)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_matrices_as_wholes_leave_their_units_free(name: str) -> None:
    build, sizes = NETWORKS[name]
    spec = check(build, noise(3, 4), *sizes)
    assert not [pin for pin in spec.pins if "no rule" in pin.reason]


FREE: dict[str, tuple[Callable[[], nn.Module], Inputs, tuple[int, ...]]] = {
    "adapters with sizes": (
        lambda: nn.Sequential(Dora(4, 8), nn.ReLU(), Dora(8, 6), nn.Tanh(), Dora(6, 2)), noise(3, 4), (3, 3, 8, 3, 6),
    ),
    "layer in the frequency domain": (Fourier, noise(2, 8, 1), (5, 5)),
    "complex weights": (Complex, noise(3, 4), (5, 6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_adapters_and_complex_layers_leave_their_units_free(name: str) -> None:
    build, inputs, sizes = FREE[name]
    check(build, inputs, *sizes)


def test_units_that_a_fourier_transform_mixes_stay_and_say_why() -> None:
    mix = weights(lambda net, h: torch.fft.fft(h, dim=-1).real.relu())
    assert "mixed by a Fourier transform" in reasons(check(mix, noise(3, 4)), "a.weight")


def test_entries_beside_a_diagonal_are_read_in_order() -> None:
    spec = check(weights(lambda net, h: h[:, 1:] * torch.diagonal(net.w["v"], 1), v=(6, 6)), noise(3, 4))
    assert "order matters here" in reasons(spec, "w.v")
