"""Networks that the rules were not written for are exact, nearly all of them can move, and copies are brought back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from c2m3_fl.core.describe import coverage
from c2m3_fl.core.match import match
from c2m3_fl.core.permutation import apply, random
from c2m3_fl.network.calibration import as_inputs
from c2m3_fl.symmetry.discover import derive
from c2m3_fl.symmetry.proof import Prover
from tests.symmetry import elsewhere
from tests.symmetry.families import Inputs, noise, tokens

# Network, inputs, and how many groups a reader counts.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Inputs, int, str]] = {
    "detr": (
        elsewhere.Detr, noise(2, 3, 24, 24), 15,
        "stem; two halves of the stream, one with places of columns; heads, q/k, v/o of 3 attentions; 3 hidden layers",
    ),
    "mixer": (elsewhere.Mixer, noise(2, 3, 8, 8), 3, "the stream, hidden layers over patches and over channels"),
    "wavenet": (elsewhere.WaveNet, noise(2, 1, 12), 6, "residual stream, skip stream, 3 gated layers, hidden layer"),
    "perceiver": (
        elsewhere.Perceiver, noise(2, 6, 5), 9, "stream, inputs, heads, q/k, v/o of two attentions, hidden layer",
    ),
    "denoising-unet": (
        elsewhere.DenoisingUNet, (noise(2, 1, 8, 8), noise(2, 3)), 9,
        "3 blocks of GroupNorm's halves, their channels, and BatchNorm's channels",
    ),
    "reader": (elsewhere.Reader, tokens(2, 7), 6, "embedding, 2 layers of 2 directions, attention's hidden layer"),
    "autoencoder": (elsewhere.Autoencoder, noise(2, 1, 8, 8), 5, "3 hidden layers, latents, transposed convolution"),
    "linear-attention": (elsewhere.LinearAttention, noise(2, 4, 5), 4, "stream, heads, q/k, v/o"),
    "state-space": (elsewhere.StateSpace, noise(2, 5, 3), 2, "channels, states"),
    "splines": (
        lambda: nn.Sequential(elsewhere.SplineLayer(3, 6), elsewhere.SplineLayer(6, 4), elsewhere.SplineLayer(4, 2)),
        noise(4, 3), 2, "two hidden layers",
    ),
    "experts": (elsewhere.Experts, noise(3, 4), 3, "stream, experts, one order of hidden units for all experts"),
    "conditioned": (elsewhere.Conditioned, (noise(2, 1, 5, 5), noise(2, 3)), 2, "hidden layer, channels"),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_from_elsewhere_are_exact_and_brought_back(name: str) -> None:
    build, inputs, count, why = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build().eval()
    spec, modes = derive(network, as_inputs(inputs))
    for training in modes:
        assert Prover(network, as_inputs(inputs), training=training).error(spec) < 1e-9
    assert not [pin for pin in spec.pins if "no rule" in pin.reason]
    assert coverage(spec) >= 0.9
    assert len(spec.groups) == count, f"expected {why}; found {spec}"
    params = {name: value.detach() for name, value in network.state_dict().items()}
    copy = apply(spec, random(spec, torch.Generator().manual_seed(1)), params)
    back = apply(spec, match(spec, [params, copy]).between(0, 1), copy)
    assert all(torch.equal(back[name], value) for name, value in params.items())
