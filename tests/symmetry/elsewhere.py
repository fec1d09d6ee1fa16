"""Networks that no rule was written for: what other people train, small."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Detr(nn.Module):
    """Convolutions, positions of rows and columns side by side, a transformer with learned queries, two heads."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, width, 3, 2, 1))
        self.row, self.column = (nn.Parameter(torch.rand(6, width // 2)) for _ in range(2))
        self.queries = nn.Parameter(torch.rand(5, width))
        self.transformer = nn.Transformer(width, 2, 1, 1, 20, dropout=0.0, batch_first=True)
        self.classes = nn.Linear(width, 4)
        self.boxes = nn.Sequential(nn.Linear(width, 9), nn.ReLU(), nn.Linear(9, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        batch, _, height, width = x.shape
        rows = self.row[:height].unsqueeze(1).repeat(1, width, 1)
        places = torch.cat([self.column[:width].unsqueeze(0).repeat(height, 1, 1), rows], dim=-1)
        found = self.transformer(
            places.flatten(0, 1) + x.flatten(2).transpose(1, 2), self.queries.expand(batch, -1, -1)
        )
        return {"logits": self.classes(found), "boxes": self.boxes(found).sigmoid()}


class Mixer(nn.Module):
    """Linear layers over patches and over channels in turn."""

    def __init__(self, width: int = 12, patches: int = 16):
        super().__init__()
        self.patch, self.norm, self.inner = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(patches, 20), nn.GELU(), nn.Linear(20, patches))
        self.channels = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(self.inner(x))).mean(1))


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, a residual stream and a stream of skips."""

    def __init__(self, width: int = 8, skips: int = 10, depth: int = 3):
        super().__init__()
        self.inward = nn.Conv1d(1, width, 1)
        self.filters, self.gates = (
            nn.ModuleList(nn.Conv1d(width, width, 2, dilation=2**i) for i in range(depth)) for _ in range(2)
        )
        self.residuals = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(depth))
        self.skips = nn.ModuleList(nn.Conv1d(width, skips, 1) for _ in range(depth))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(skips, skips, 1), nn.ReLU(), nn.Conv1d(skips, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.inward(x), torch.zeros(())
        for i, layers in enumerate(zip(self.filters, self.gates, self.residuals, self.skips, strict=True)):
            filtered, gate, residual, skip = layers
            past = functional.pad(x, (2**i, 0))
            y = torch.tanh(filtered(past)) * torch.sigmoid(gate(past))
            total, x = total + skip(y), x + residual(y)
        return self.head(total)


class Perceiver(nn.Module):
    """Learned latents attend to inputs of another width, then to themselves."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.latents, self.inputs = nn.Parameter(torch.randn(4, width)), nn.Linear(5, 7)
        self.cross = nn.MultiheadAttention(width, 3, kdim=7, vdim=7, batch_first=True)
        self.inner = nn.TransformerEncoderLayer(width, 3, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        latents, x = self.latents.expand(x.shape[0], -1, -1), self.inputs(x)
        latents = latents + self.cross(latents, x, x, need_weights=False)[0]
        return self.head(self.inner(latents).mean(1))


class DenoisingUNet(nn.Module):
    """Down and up with skips, the time of diffusion added to the deepest features."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.joint = self.block(1, 4), self.block(4, 6), self.block(10, 4)
        self.time, self.out = nn.Linear(3, 6), nn.Conv2d(4, 1, 1)

    @staticmethod
    def block(inward: int, outward: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inward, outward, 3, padding=1), nn.GroupNorm(2, outward), nn.SiLU(),
            nn.Conv2d(outward, outward, 3, padding=1), nn.BatchNorm2d(outward), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        skip = self.down1(x)
        deep = self.down2(functional.max_pool2d(skip, 2)) + self.time(time)[:, :, None, None]
        return self.out(self.joint(torch.cat([functional.interpolate(deep, scale_factor=2), skip], 1)))


class Reader(nn.Module):
    """A bidirectional LSTM whose steps are weighed by attention; the weights are an output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.lstm = nn.Embedding(9, 6), nn.LSTM(6, 8, 2, bidirectional=True, batch_first=True)
        self.attend, self.score, self.head = nn.Linear(16, 10), nn.Linear(10, 1, bias=False), nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        steps, _ = self.lstm(self.tokens(tokens))
        weights = self.score(torch.tanh(self.attend(steps))).softmax(1)
        return self.head((weights * steps).sum(1)), weights


class Autoencoder(nn.Module):
    """A variational autoencoder: the units of mean and deviation are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 12), nn.ReLU())
        self.mean, self.spread, self.inward = nn.Linear(12, 4), nn.Linear(12, 4), nn.Linear(4, 96)
        self.decoder = nn.Sequential(
            nn.Unflatten(1, (6, 4, 4)), nn.ConvTranspose2d(6, 5, 2, 2), nn.ReLU(), nn.Conv2d(5, 1, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, spread = self.mean(hidden), self.spread(hidden)
        latent = mean + torch.randn_like(mean) * (0.5 * spread).exp() if self.training else mean
        return self.decoder(self.inward(latent).relu()), (mean**2 + spread.exp() - spread).sum(1)


class LinearAttention(nn.Module):
    """Attention without softmax, its keys and values contracted first."""

    def __init__(self, width: int = 12, heads: int = 3):
        super().__init__()
        self.heads, self.inward, self.norm = heads, nn.Linear(5, width), nn.LayerNorm(width)
        self.qkv, self.o, self.head = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = functional.elu(q) + 1, functional.elu(k) + 1
        scale = 1 / (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
        y = (q @ (k.transpose(-2, -1) @ v)) * scale
        return self.head(x + self.o(y.transpose(1, 2).reshape(batch, length, width)))


class StateSpace(nn.Module):
    """A selective state space (Mamba), its recurrence spelled out; states are units, too."""

    def __init__(self, width: int = 8, states: int = 4):
        super().__init__()
        self.inward, self.near = nn.Linear(3, 2 * width), nn.Conv1d(width, width, 3, padding=2, groups=width)
        self.decay, self.skip = nn.Parameter(torch.randn(width, states)), nn.Parameter(torch.randn(width))
        self.write, self.read = nn.Linear(width, states, bias=False), nn.Linear(width, states, bias=False)
        self.speed, self.head = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.inward(x).chunk(2, dim=-1)
        length = x.shape[1]
        x = functional.silu(self.near(x.transpose(1, 2))[..., :length].transpose(1, 2))
        speed, write, read = functional.softplus(self.speed(x)), self.write(x), self.read(x)
        state, steps = torch.zeros(()), []
        for t in range(length):
            kept = torch.exp(-speed[:, t, :, None] * self.decay.exp()) * state
            state = kept + speed[:, t, :, None] * write[:, t, None] * x[:, t, :, None]
            steps.append((state * read[:, t, None]).sum(-1))
        return self.head((torch.stack(steps, 1) + self.skip * x) * functional.silu(gate))


class SplineLayer(nn.Module):
    """A Kolmogorov-Arnold layer: a learned function of every input for every output."""

    def __init__(self, inward: int, outward: int, knots: int = 5):
        super().__init__()
        self.register_buffer("grid", torch.linspace(-1, 1, knots))
        self.curves, self.base = nn.Parameter(torch.randn(outward, inward, knots)), nn.Linear(inward, outward)

    def forward(self, x: Tensor) -> Tensor:
        bumps = torch.exp(-((3 * (x[..., None] - self.grid)) ** 2))
        return torch.einsum("big,oig->bo", bumps, self.curves) + self.base(functional.silu(x))


class Experts(nn.Module):
    """A softmax over experts whose weights are stacked in one tensor."""

    def __init__(self, width: int = 6, experts: int = 3):
        super().__init__()
        self.inward, self.gate, self.out = nn.Linear(4, width), nn.Linear(width, experts), nn.Linear(width, 2)
        self.up = nn.Parameter(torch.randn(experts, width, 7))
        self.down = nn.Parameter(torch.randn(experts, 7, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        hidden = torch.einsum("bd,edh->beh", x, self.up).relu()
        return self.out(x + torch.einsum("beh,ehd,be->bd", hidden, self.down, self.gate(x).softmax(-1)))


class Conditioned(nn.Module):
    """Scale and shift of every channel computed from a second input (FiLM), then both signs of every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 16))
        self.a, self.b = nn.Conv2d(1, 8, 3), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.condition(condition).chunk(2, dim=-1)
        x = self.a(x) * scale[:, :, None, None] + shift[:, :, None, None]
        return self.b(torch.cat([x.relu(), (-x).relu()], dim=1)).amax((2, 3))
