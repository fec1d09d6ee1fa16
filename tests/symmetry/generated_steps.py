"""Steps of random networks that suit images and sequences alike: residuals, concatenations, splits, slices, ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

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

    # Units that are treated unlike: parts of the features, at places that the code names.

    def apart(self, dim: int) -> None:
        if self.width > 1:
            first = self.one_of(1, self.width // 2)

            def two(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
                return torch.cat(
                    [x.narrow(dim, 0, first).relu(), x.narrow(dim, first, x.shape[dim] - first).tanh()], dim
                )

            self.step(f"apart {first}", two)

    def written(self, dim: int) -> None:
        begin, step, zero = self.one_of(0, 1), self.one_of(1, 2), self.draw(st.booleans())
        if self.width > 2:

            def write(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
                x = x.clone()
                part = x.transpose(0, dim)[begin : self.width // 2 + 1 : step]
                part.zero_() if zero else part.sigmoid_()
                return x

            self.step(f"write {begin}::{step}", write)

    def indexed(self, dim: int) -> None:
        places = torch.arange(self.width)[:: self.one_of(2, 3)]
        kind = self.one_of(0, 1, 2)

        def put(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
            part = x.index_select(dim, places).tanh()
            if kind == 0:
                return x.index_add(dim, places, part)
            return x.index_copy(dim, places, part) if kind == 1 else x.index_fill(dim, places, 0.5)

        self.step(f"index {kind}", put)

    def masked(self, dim: int) -> None:
        mask = (torch.arange(self.width) < self.one_of(1, 2)).view(-1, *(1 for _ in range(2 if dim == 1 else 0)))
        self.step("mask", lambda layers, x, past: torch.where(mask, x, x.abs()))

    def ranked(self, dim: int) -> None:
        count = self.one_of(1, self.width)

        def largest(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
            values, places = x.topk(count, dim)
            return torch.zeros_like(x).scatter(dim, places, values)

        self.step(f"largest {count}", largest)

    def closed(self, dim: int) -> None:
        """A branch, its halves treated unlike, behind a gate that starts at zero."""
        if self.width > 1:
            half = self.width // 2
            name = self.layer(nn.ParameterList([torch.zeros(())]))

            def branch(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
                parts = torch.tanh(x.narrow(dim, 0, half)), torch.relu(x.narrow(dim, half, x.shape[dim] - half))
                return x + layers[name][0] * torch.cat(parts, dim)

            self.step("closed gate", branch)

    def narrow_type(self, dim: int) -> None:
        kind = self.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        self.step(f"in {kind}", lambda layers, x, past: torch.tanh(x.to(kind)).to(x.dtype))

    def margin(self, dim: int) -> None:
        if self.width <= 20:
            pad = (0, 0, 0, 0, 1, 1) if dim == 1 else (1, 1)
            self.step("pad", lambda layers, x, past: functional.pad(x, pad), self.width + 2)
