"""Random residual streams whose groups are known: tables, cells, messages and ties between norms, gates and layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tests.symmetry.generated_steps import Draw, Generated, Plan
from tests.symmetry.generated_ties import TIES

_PLACES = 5
_OFFSETS = torch.arange(_PLACES)[:, None] - torch.arange(_PLACES) + _PLACES - 1  # from 0 to 8: every entry is read
_SOURCES, _TARGETS = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 0, 4, 1, 3])


@dataclass(frozen=True)
class Stream:
    """A network, one batch, and the sizes of the groups that a reader expects."""

    network: nn.Module
    inputs: Tensor
    sizes: list[int]

    def __repr__(self) -> str:
        return f"{self.network.extra_repr()}: {self.sizes}"


class StreamPlan(Plan):
    """Draws blocks of a residual stream of shape (batch, 5, width); `sizes` are those of the groups so far."""

    def __init__(self, draw: Draw, width: int):
        super().__init__(draw, width)
        self.sizes = [width]
        self.tables: list[tuple[int, int, str]] = []

    def linear(self, ins: int, outs: int) -> str:
        return self.layer(nn.Linear(ins, outs))

    def norm(self) -> None:
        layer = self.draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d]))(self.width)
        name, over = self.layer(layer), isinstance(layer, nn.BatchNorm1d)

        def normed(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
            return layers[name](x.flatten(0, 1)).view_as(x) if over else layers[name](x)

        self.step(repr(layer), normed)

    def gated(self) -> None:
        """SwiGLU from one packed layer, behind a gate that may start at zero."""
        hidden = self.one_of(3, 4)
        up, down = self.linear(self.width, 2 * hidden), self.linear(hidden, self.width)
        gate = self.layer(nn.ParameterList([torch.full((), float(self.one_of(0, 1)))]))
        self.sizes.append(hidden)

        def gated(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
            open_, value = layers[up](x).chunk(2, -1)
            return x + layers[gate][0] * layers[down](functional.silu(open_) * value)

        self.step(f"gated {hidden}", gated)

    def table(self) -> None:
        """Attention with a learned table of relative positions, of this block or shared with an earlier one."""
        kind, heads, key, value = self.one_of(0, 1, 2, 3), self.one_of(1, 2, 3), self.one_of(2, 3), self.one_of(2, 4)
        sizes, count = [key, key, value], 2 * _PLACES - 1
        inner = [key if kind == 3 else heads * key, heads * value]  # a table of vectors has one order for all heads
        earlier = [name for known, size, name in self.tables if (known, size) == (kind, heads) and kind < 3]
        if earlier and self.draw(st.booleans()):
            table, own = earlier[0], inner
        else:
            shapes = [(heads, count), (count, heads), (count, heads), (count, key)]
            learnt = torch.randn(shapes[kind])
            table, own = self.layer(nn.ParameterList([learnt])), [heads, *inner]
            self.tables.append((kind, heads, table))
        qkv, out = self.linear(self.width, heads * sum(sizes)), self.linear(heads * value, self.width)
        self.sizes.extend(size for size in own if size > 1)

        def attend(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
            q, k, v = layers[qkv](x).unflatten(-1, (heads, -1)).transpose(1, 2).split(sizes, -1)
            learnt, scores = layers[table][0], q @ k.mT
            if kind == 0:
                scores = scores + learnt[:, _OFFSETS]
            elif kind == 1:  # as Swin does
                scores = scores + learnt[_OFFSETS.flatten()].view(_PLACES, _PLACES, heads).permute(2, 0, 1)
            elif kind == 2:  # as T5 does
                scores = scores + functional.embedding(_OFFSETS, learnt).permute(2, 0, 1).unsqueeze(0)
            else:  # a vector per offset beside the keys, the same for all heads
                scores = scores + torch.einsum("bhqs,qks->bhqk", q, learnt[_OFFSETS])
            return x + layers[out]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

        self.step(f"table {kind}, {heads} heads of {key} and {value}", attend)

    def cell(self) -> None:
        """A recurrent cell over the places, in its own units or in those of the stream."""
        kind = self.one_of(*range(6))
        own, both, learnt = (self.draw(st.booleans()) for _ in range(3))
        width = self.one_of(3, 4) if own else self.width
        make = [nn.RNNCell, nn.GRUCell, nn.LSTMCell]
        gates = [1, 2, 4][kind % 3]
        name = self.layer(make[kind](self.width, width) if kind < 3 else nn.Linear(self.width + width, gates * width))
        new = self.linear(self.width + width, width) if kind == 4 else ""
        first = self.layer(nn.ParameterList([torch.randn(width) for _ in range(1 + (gates == 4))])) if learnt else ""
        out = self.linear((2 if both else 1) * width, self.width) if own else ""
        if own:
            self.sizes.append(width)

        def update(layers: nn.ModuleDict, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
            if kind < 3:
                return layers[name](x, (h, c)) if kind == 2 else (layers[name](x, h), c)
            parts = layers[name](torch.cat([x, h], -1)).chunk(gates, -1)
            if kind == 3:
                return parts[0].tanh(), c
            if kind == 4:  # a GRU by hand
                r, z = parts[0].sigmoid(), parts[1].sigmoid()
                return z * h + (1 - z) * layers[new](torch.cat([x, r * h], -1)).tanh(), c
            c = parts[0].sigmoid() * c + parts[1].sigmoid() * parts[2].tanh()
            return parts[3].sigmoid() * c.tanh(), c

        def states(layers: nn.ModuleDict, x: Tensor) -> Tensor:
            h = c = x.new_zeros(len(x), width)
            if learnt:
                h, c = (layers[first][place].expand(len(x), -1) for place in (0, -1))
            found = []
            for place in x.unbind(1):
                h, c = update(layers, place, h, c)
                found.append(h)
            return torch.stack(found, 1)

        def unrolled(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
            there = states(layers, x)
            back = states(layers, x.flip(1)).flip(1) if both else None
            if own:
                return x + layers[out](there if back is None else torch.cat([there, back], -1))
            return x + there if back is None else x + there * back

        self.step(f"cell {kind}, {width} units, {own=}, {both=}, {learnt=}", unrolled)

    def messages(self) -> None:
        """Messages along the edges of a graph, gathered at the nodes: every example apart, or all as one graph."""
        kind, scaled, own = self.one_of(*range(7)), self.one_of(0, 1, 2, 3), self.draw(st.booleans())
        width = self.one_of(3, 4) if own else self.width
        send = self.linear(2 * self.width, width)
        score = self.linear(width, 1) if scaled == 2 else ""
        weight = self.layer(nn.ParameterList([torch.rand(len(_SOURCES), 1) + 0.5])) if scaled == 1 else ""
        out = self.linear(width, self.width) if own else ""
        if own:
            self.sizes.append(width)

        def gather(messages: Tensor, zeros: Tensor) -> Tensor:
            if kind == 0:
                return zeros.index_add(1, _TARGETS, messages)
            if kind == 1:
                return zeros.index_put((torch.arange(len(zeros))[:, None], _TARGETS), messages, accumulate=True)
            if kind == 2:  # all examples are one graph of more nodes
                to = (_TARGETS + _PLACES * torch.arange(len(zeros))[:, None]).flatten()
                return zeros.flatten(0, 1).index_add_(0, to, messages.flatten(0, 1)).view_as(zeros)
            place = _TARGETS[:, None].expand_as(messages)
            if kind == 3:
                return zeros.scatter_add(1, place, messages)
            reduction = ("sum", "mean", "amax")[kind - 4]
            return zeros.scatter_reduce(1, place, messages, reduction, include_self=kind != 6)

        def sent(layers: nn.ModuleDict, x: Tensor, past: list[Tensor]) -> Tensor:
            messages = layers[send](torch.cat([x[:, _SOURCES], x[:, _TARGETS]], -1)).tanh()
            if scaled == 1:  # a weight per edge
                messages = messages * layers[weight][0]
            elif scaled == 2:  # attention along the edges
                scores = layers[score](messages).exp()
                messages = messages * scores / x.new_zeros(*x.shape[:2], 1).index_add(1, _TARGETS, scores)[:, _TARGETS]
            elif scaled == 3:  # the degrees of the nodes
                degrees = x.new_zeros(_PLACES).index_add(0, _TARGETS, x.new_ones(len(_TARGETS)))
                messages = messages / degrees[_TARGETS, None]
            found = gather(messages, x.new_zeros(*x.shape[:2], width))
            return x + (layers[out](found) if own else found)

        self.step(f"messages {kind}, {scaled=}, {width} units, {own=}", sent)

    def tie(self) -> None:
        tie = self.draw(st.sampled_from(TIES))
        made = tie(self.width)
        name = self.layer(made)
        self.sizes.extend(made.sizes)
        self.step(f"tie {tie.__name__}", lambda layers, x, past: layers[name](x))


PATTERNS = ("table", "cell", "messages", "tie")
_BETWEEN = ("norm", "gated")


@st.composite
def streams(draw: Draw, first: str | None = None) -> Stream:
    """A stream of one to four patterns; the first one of them may be chosen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 99)))
        plan = StreamPlan(draw, draw(st.sampled_from([5, 6])))
        stem = plan.linear(3, plan.width)
        plan.step("stem", lambda layers, x, past: layers[stem](x))
        names = draw(st.lists(st.sampled_from(PATTERNS), min_size=0 if first else 1, max_size=3))
        for name in [first, *names] if first else names:
            for between in draw(st.lists(st.sampled_from(_BETWEEN), max_size=1)):
                getattr(plan, between)()
            getattr(plan, name)()
        network = Generated(plan.steps, plan.layers, plan.width, 3, image=False)
        return Stream(network.eval(), torch.randn(4, _PLACES, 3), sorted(plan.sizes))
