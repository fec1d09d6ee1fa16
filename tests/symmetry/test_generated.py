"""Networks nobody wrote: random sequences of layers with residuals, concatenations, splits and groups."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from c2m3_fl.network.calibration import as_inputs
from c2m3_fl.symmetry.discover import derive
from c2m3_fl.symmetry.proof import Prover

Draw = Callable[[st.SearchStrategy], int]


class Generated(nn.Module):
    """Runs a list of steps; each is a function of the network, the current tensor and all tensors before it."""

    def __init__(
        self, steps: list[tuple[str, Callable]], layers: dict[str, nn.Module], width: int, heads: int, image: bool
    ):
        super().__init__()
        self.steps, self.image = steps, image
        self.layers = nn.ModuleDict(layers)
        self.head = nn.Linear(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        past: list[Tensor] = []
        for _, step in self.steps:
            x = step(self.layers, x, past)
            past.append(x)
        return self.head(x.mean((2, 3)) if self.image else x.mean(1))

    def extra_repr(self) -> str:
        return " -> ".join(name for name, _ in self.steps)


class Plan:
    """Draws steps one by one, keeping track of the number of channels."""

    def __init__(self, draw: Draw, width: int):
        self.draw, self.width = draw, width
        self.widths: list[int] = []
        self.steps: list[tuple[str, Callable]] = []
        self.layers: dict[str, nn.Module] = {}

    def layer(self, layer: nn.Module) -> str:
        name = f"l{len(self.layers)}"
        self.layers[name] = layer
        return name

    def step(self, name: str, function: Callable, width: int | None = None) -> None:
        self.width = width or self.width
        self.widths.append(self.width)
        self.steps.append((name, function))

    def one_of(self, *options: int) -> int:
        return self.draw(st.sampled_from(options))

    def same_width(self) -> list[int]:
        return [place for place, width in enumerate(self.widths) if width == self.width]

    # Steps that suit images and sequences alike: `dim` is the dimension of the features.

    def activation(self, dim: int) -> None:
        function = self.draw(st.sampled_from([torch.relu, torch.tanh, functional.silu, torch.abs]))
        self.step(function.__name__, lambda layers, x, past: function(x))

    def residual(self, dim: int) -> None:
        if places := self.same_width():
            place = self.one_of(*places)
            self.step(f"add {place}", lambda layers, x, past: x + past[place])

    def product(self, dim: int) -> None:
        if places := self.same_width():
            place = self.one_of(*places)
            self.step(f"times {place}", lambda layers, x, past: x * past[place].sigmoid())

    def join(self, dim: int) -> None:
        if self.widths and self.width + self.widths[place := self.one_of(*range(len(self.widths)))] <= 24:
            self.step(
                f"cat {place}",
                lambda layers, x, past: torch.cat([past[place], x], dim),
                self.width + self.widths[place],
            )

    def half(self, dim: int) -> None:
        if self.width % 2 == 0 and self.width >= 4:
            side = self.one_of(0, 1)
            self.step(f"half {side}", lambda layers, x, past: x.chunk(2, dim)[side], self.width // 2)

    def gate(self, dim: int) -> None:
        if self.width % 2 == 0 and self.width >= 4:
            self.step("glu", lambda layers, x, past: functional.glu(x, dim), self.width // 2)

    def interleave(self, dim: int) -> None:
        parts = self.one_of(2, 3)
        if self.width % parts == 0 and self.width > parts:

            def shuffled(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
                return x.unflatten(dim, (parts, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)

            self.step(f"shuffle {parts}", shuffled)

    def softmax(self, dim: int) -> None:
        self.step("softmax", lambda layers, x, past: x.softmax(dim))

    def scale(self, dim: int) -> None:
        shape = [self.width, 1, 1] if dim == 1 else [self.width]
        name = self.layer(nn.ParameterList([torch.randn(shape)]))
        self.step("scale", lambda layers, x, past: x * layers[name][0])

    def flip(self, dim: int) -> None:
        self.step("flip", lambda layers, x, past: x.flip(dim))

    def copies(self, dim: int) -> None:
        if self.width <= 12:
            first = self.one_of(0, 1)  # every channel twice in a row, or all channels twice

            def repeated(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
                shape = (*x.shape[:dim], *((2, x.shape[dim]) if first else (x.shape[dim], 2)), *x.shape[dim + 1 :])
                return x.unsqueeze(dim if first else dim + 1).expand(shape).flatten(dim, dim + 1)

            self.step(f"copies {first}", repeated, 2 * self.width)

    def margin(self, dim: int) -> None:
        if self.width <= 20:
            pad = (0, 0, 0, 0, 1, 1) if dim == 1 else (1, 1)
            self.step("pad", lambda layers, x, past: functional.pad(x, pad), self.width + 2)


class ImagePlan(Plan):
    def call(self, layer: nn.Module, width: int | None = None) -> None:
        name = self.layer(layer)
        self.step(repr(layer), lambda layers, x, past: layers[name](x), width)

    def conv(self, dim: int) -> None:
        width = self.one_of(3, 4, 6, 8)
        self.call(nn.Conv2d(self.width, width, self.one_of(1, 3), padding="same"), width)

    def grouped(self, dim: int) -> None:
        groups = self.one_of(2, 3, self.width)
        if self.width % groups == 0:
            width = groups * self.one_of(1, 2)
            self.call(nn.Conv2d(self.width, width, 3, padding=1, groups=groups), width)

    def transposed(self, dim: int) -> None:
        width = self.one_of(4, 6)
        self.call(nn.ConvTranspose2d(self.width, width, 3, padding=1, groups=2 if self.width % 2 == 0 else 1), width)

    def norm(self, dim: int) -> None:
        groups = self.one_of(1, 2, 3)
        if self.width > 1:
            self.call(nn.GroupNorm(groups, self.width) if self.width % groups == 0 else nn.BatchNorm2d(self.width))

    def prelu(self, dim: int) -> None:
        self.call(nn.PReLU(self.width))

    def squeeze(self, dim: int) -> None:
        name = self.layer(nn.Linear(self.width, self.width))
        self.step("se", lambda layers, x, past: x * layers[name](x.mean((2, 3))).sigmoid()[:, :, None, None])


class SequencePlan(Plan):
    def call(self, layer: nn.Module, width: int | None = None) -> None:
        name = self.layer(layer)
        self.step(repr(layer), lambda layers, x, past: layers[name](x), width)

    def linear(self, dim: int) -> None:
        width = self.one_of(3, 4, 6, 12)
        self.call(nn.Linear(self.width, width), width)

    def norm(self, dim: int) -> None:
        self.call(self.draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm]))(self.width))

    def attention(self, dim: int) -> None:
        heads = self.one_of(1, 2, 3)
        if self.width % heads == 0:
            name = self.layer(nn.Linear(self.width, 3 * self.width))

            def attend(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
                q, k, v = layers[name](x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
                return (torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2)

            self.step(f"attention {heads}", attend)

    def shared_keys(self, dim: int) -> None:
        heads, keys = self.one_of(2, 4), self.one_of(1, 2)
        if self.width % heads == 0:
            size = self.width // heads
            name = self.layer(nn.Linear(self.width, (heads + 2 * keys) * size))

            def attend(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
                parts = layers[name](x).split([heads * size, keys * size, keys * size], dim=-1)
                q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in parts)
                k, v = (part.repeat_interleave(heads // keys, dim=1) for part in (k, v))
                return (torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2)

            self.step(f"attention {heads} to {keys}", attend)

    def recurrent(self, dim: int) -> None:
        kind, both = self.draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN])), self.draw(st.booleans())
        name = self.layer(kind(self.width, 4, bidirectional=both, batch_first=True))
        self.step(kind.__name__, lambda layers, x, past: layers[name](x)[0], 8 if both else 4)

    def convolve(self, dim: int) -> None:
        name = self.layer(nn.Conv1d(self.width, self.width, 3, padding=1, groups=self.one_of(1, self.width)))
        self.step("conv1d", lambda layers, x, past: layers[name](x.mT).mT)


_SHARED = (
    "activation",
    "residual",
    "product",
    "join",
    "half",
    "gate",
    "interleave",
    "softmax",
    "scale",
    "flip",
    "margin",
    "copies",
)
_IMAGE = (*_SHARED, "conv", "conv", "grouped", "grouped", "transposed", "norm", "prelu", "squeeze")
_SEQUENCE = (*_SHARED, "linear", "linear", "norm", "attention", "shared_keys", "recurrent", "convolve")


@st.composite
def networks(draw: Draw, *, image: bool) -> tuple[nn.Module, Tensor]:
    plan = (ImagePlan if image else SequencePlan)(draw, 3)
    dim = 1 if image else 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 99)))
        (plan.conv if image else plan.linear)(dim)
        for name in draw(st.lists(st.sampled_from(_IMAGE if image else _SEQUENCE), min_size=2, max_size=9)):
            getattr(plan, name)(dim)
        inputs = torch.randn((2, 3, 4, 4) if image else (2, 5, 3))
        return Generated(plan.steps, plan.layers, plan.width, 3, image).eval(), inputs


def _invariant(network: nn.Module, inputs: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same'")
        spec, _ = derive(network, as_inputs(inputs))
        assert not [pin for pin in spec.pins if "no rule" in pin.reason]
        prover = Prover(network, as_inputs(inputs))
        for name in [None, *spec.groups]:
            assert prover.error(spec, None if name is None else [name]) < 1e-9, f"{name} of\n{spec}"


_SETTINGS = settings(deadline=None, print_blob=True, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@settings(_SETTINGS, max_examples=8)
@given(made=st.booleans().flatmap(lambda image: networks(image=image)))
def test_rules_are_exact_on_generated_networks(made: tuple[nn.Module, Tensor]) -> None:
    _invariant(*made)


@pytest.mark.slow
@settings(_SETTINGS, max_examples=80)
@given(made=st.booleans().flatmap(lambda image: networks(image=image)))
def test_rules_are_exact_on_many_generated_networks(made: tuple[nn.Module, Tensor]) -> None:
    _invariant(*made)
