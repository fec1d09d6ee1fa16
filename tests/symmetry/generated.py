"""Random networks: images or sequences through layers, attention, cells, messages, and the steps between them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.symmetry.generated_steps import Draw, Generated, Plan


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

    def table(self, dim: int) -> None:
        """Attention between the pixels of a row, with a bias per distance, looked up in a table."""
        name, bias = self.layer(nn.Conv2d(self.width, 3 * self.width, 1)), self.layer(nn.Embedding(4, 1))
        distance = (torch.arange(4)[:, None] - torch.arange(4)).abs()

        def attend(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
            q, k, v = layers[name](x).movedim(1, -1).chunk(3, -1)
            return x + (torch.softmax(q @ k.mT + layers[bias](distance).squeeze(-1), -1) @ v).movedim(-1, 1)

        self.step("table", attend)

    def tied_back(self, dim: int) -> None:
        """A convolution, and the transposed one with the same weight: one object, or one memory."""
        up, down = nn.Conv2d(self.width, 5, 3, padding=1), nn.ConvTranspose2d(5, self.width, 3, padding=1)
        if self.draw(st.booleans()):
            down.weight = up.weight
        else:
            down.weight.data = up.weight.data.view(5, self.width, 3, 3)
        names = self.layer(up), self.layer(down)
        self.step("tied", lambda layers, x, past: layers[names[1]](layers[names[0]](x).tanh()))

    def joined_state(self, dim: int) -> None:
        """A convolutional recurrent cell over the rows of the image."""
        width = self.one_of(3, 4)
        name = self.layer(nn.Conv1d(self.width + width, width, 3, padding=1))

        def unrolled(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
            state, out = x.new_zeros(len(x), width, x.shape[3]), []
            for row in x.unbind(2):
                state = layers[name](torch.cat([row, state], 1)).tanh()
                out.append(state)
            return torch.stack(out, 2)

        self.step("state", unrolled, width)

    def messages(self, dim: int) -> None:
        """Pixels that are gathered by segment, and read back from there."""
        name, kind = self.layer(nn.Linear(self.width, self.width)), self.one_of(0, 1)
        segment = torch.arange(16) % 3

        def pooled(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
            pixels = x.flatten(2)
            zeros = x.new_zeros(*x.shape[:2], 3)
            if kind == 0:
                sums = zeros.index_add(2, segment, pixels)
            else:
                sums = zeros.scatter_reduce(2, segment.expand_as(pixels), pixels, "amax", include_self=False)
            return x + layers[name](sums.mT).mT[:, :, segment].view_as(x)

        self.step(f"segments {kind}", pooled)


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

    def cell(self, dim: int) -> None:
        kind, width = self.draw(st.sampled_from([nn.LSTMCell, nn.GRUCell, nn.RNNCell])), self.one_of(3, 4)
        name = self.layer(kind(self.width, width))

        def unrolled(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
            state, out = None, []
            for step in x.unbind(1):
                state = layers[name](step, state)
                out.append(state[0] if kind is nn.LSTMCell else state)
            return torch.stack(out, 1)

        self.step(kind.__name__, unrolled, width)

    def joined_state(self, dim: int) -> None:
        width = self.one_of(3, 4)
        name = self.layer(nn.Linear(self.width + width, width))

        def unrolled(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
            state, out = x.new_zeros(len(x), width), []
            for step in x.unbind(1):
                state = layers[name](torch.cat([step, state], -1)).tanh()
                out.append(state)
            return torch.stack(out, 1)

        self.step("state", unrolled, width)

    def messages(self, dim: int) -> None:
        name, kind = self.layer(nn.Linear(2 * self.width, self.width)), self.one_of(0, 1, 2)
        sources, targets = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 0, 4, 1, 3])

        def send(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
            sent = layers[name](torch.cat([x[:, sources], x[:, targets]], -1)).tanh()
            if kind == 0:
                return x + torch.zeros_like(x).index_add(1, targets, sent)
            place = targets[:, None].expand_as(sent)
            if kind == 1:
                return x + torch.zeros_like(x).scatter_add(1, place, sent)
            return x.scatter_reduce(1, place, sent, "amax")

        self.step(f"messages {kind}", send)

    def table(self, dim: int) -> None:
        """Attention with a bias per distance, looked up in a table."""
        name = self.layer(nn.Linear(self.width, 3 * self.width))
        bias = self.layer(nn.ParameterList([torch.randn(5)]))
        distance = (torch.arange(5)[:, None] - torch.arange(5)).abs()

        def attend(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
            q, k, v = layers[name](x).chunk(3, -1)
            return x + torch.softmax(q @ k.mT + layers[bias][0][distance], -1) @ v

        self.step("table", attend)

    def tied_back(self, dim: int) -> None:
        """A layer up, and one down whose weight is the first one's, transposed, in the same memory."""
        up, down = nn.Linear(self.width, 5), nn.Linear(5, self.width)
        down.weight.data = up.weight.data.t()
        names = self.layer(up), self.layer(down)
        self.step("tied", lambda layers, x, past: layers[names[1]](layers[names[0]](x).tanh()))


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
    "apart",
    "written",
    "indexed",
    "masked",
    "ranked",
    "closed",
    "narrow_type",
)
_BOTH = ("table", "tied_back", "joined_state", "messages")
_IMAGE = (*_SHARED, *_BOTH, "conv", "conv", "grouped", "grouped", "transposed", "norm", "prelu", "squeeze")
_SEQUENCE = (
    *_SHARED,
    *_BOTH,
    "linear",
    "linear",
    "norm",
    "attention",
    "shared_keys",
    "recurrent",
    "convolve",
    "cell",
)


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
