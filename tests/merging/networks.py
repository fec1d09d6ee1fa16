"""Small networks, one for every way in which statistics can be folded; data for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.symmetry.discover import permutation_spec


class ChannelNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Residual(nn.Module):
    """A residual network in small: stem, a block with a shortcut, pooling, head."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = norm(6)
        self.conv1 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.norm1 = norm(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = norm(8)
        self.short = nn.Conv2d(6, 8, 1, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.stem(images)))
        hidden = torch.relu(self.norm1(self.conv1(features)))
        features = torch.relu(self.norm2(self.conv2(hidden)) + self.short(features))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Packed projections that no module calls, a bare matrix product, RMSNorm, a parameter without channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.norm = nn.RMSNorm(12)
        self.mix = nn.Parameter(torch.randn(12, 12) / 4)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.embed(images.flatten(1, 2))
        rows = torch.cat([self.token.expand(len(rows), -1, -1), rows], 1)
        rows = rows + self.attention(rows, rows, rows, need_weights=False)[0]
        logits: Tensor = self.head(torch.relu(self.norm(rows) @ self.mix).mean(1))
        return logits


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding="same"), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, groups=2), nn.GELU(), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)),
    )


def batch_norm() -> nn.Module:
    return Residual(nn.BatchNorm2d)


def layer_norm() -> nn.Module:
    return Residual(ChannelNorm)


def group_norm() -> nn.Module:
    return Residual(lambda channels: nn.GroupNorm(2, channels))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "batch norm": batch_norm,
    "layer norm": layer_norm,
    "group norm": group_norm,
    "attention": Attention,
}


def images(count: int, seed: int) -> Tensor:
    """Smooth random images with channels of different scale and offset."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.avg_pool2d(noise, 3, 1, 1)
    return smooth * torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1) + torch.tensor([0.0, 1.0, -1.0]).view(3, 1, 1)


CALIBRATION = [images(32, 0), images(32, 1), images(20, 2)]  # the last batch is smaller


def lively(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A state dict in which nothing hides behind a zero or a one: biases, norms and running statistics are drawn."""
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            params[name] = torch.randint(1, 99, value.shape, generator=generator)
        elif name.endswith("running_var"):
            params[name] = 0.5 + torch.rand(value.shape, generator=generator)
        elif value.ndim == 1:
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            params[name] = offset + 0.3 * torch.randn(value.shape, generator=generator)
        else:
            fan_in = value[0].numel()
            params[name] = torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5
    return params


def nodes(network: str, count: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A network in evaluation mode and so many state dicts of it."""
    model = NETWORKS[network]().to(dtype).eval()
    found = [lively(model, seed) for seed in range(count)]
    return model, [{name: v.to(model.state_dict()[name].dtype) for name, v in node.items()} for node in found]


def outputs(model: nn.Module, params: dict[str, Tensor], inputs: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = torch.func.functional_call(model, params, (inputs,))
    return result


SEED = torch.Generator().manual_seed
SPECS: dict[str, PermutationSpec] = {}


def spec_of(network: str) -> PermutationSpec:
    if network not in SPECS:
        SPECS[network] = permutation_spec(NETWORKS[network]().eval(), CALIBRATION[0])
    return SPECS[network]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
