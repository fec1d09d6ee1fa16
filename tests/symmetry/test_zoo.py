"""Torchvision's classifiers: the smallest member of every family, traced and proven."""

from __future__ import annotations

import pytest

from c2m3_fl.cli.files import classifiers
from c2m3_fl.cli.zoo import survey

# Groups per network: (number, how a reader counts them).
ZOO = {
    "alexnet": (7, "5 convolutions, 2 hidden linear layers"),
    "convnext_tiny": (22, "a residual stream per stage, 4, and the hidden layer of 18 blocks"),
    "densenet121": (120, "the stem, 3 transitions, 58 layers of bottleneck and growth"),
    "efficientnet_b0": (40, "stem, 7 streams, 15 expansions, 16 squeezes, last"),
    "efficientnet_v2_s": (75, "stem, which is also the first stream, and 5 more; 38 expansions, 30 squeezes, last"),
    "googlenet": (61, "57 convolutions, and convolution and hidden layer of 2 auxiliary heads"),
    "inception_v3": (96, "94 convolutions and 2 of the auxiliary head"),
    "maxvit_t": (
        117,
        "2 stems, 4 streams, 11 layers of 2 for the convolution and 4 for each attention, hidden linear layer",
    ),
    "mnasnet0_5": (25, "stem, 7 streams, 16 expansions, last"),
    "mobilenet_v2": (25, "stem, 7 streams, 16 expansions, last"),
    "mobilenet_v3_small": (27, "stem and 6 streams, 10 expansions, 9 squeezes, last, hidden linear layer"),
    "regnet_x_400mf": (71, "stem, 4 streams, 22 blocks of groups and units into and out of them"),
    "regnet_y_400mf": (69, "stem, 4 streams, 16 blocks as in RegNetX with a squeeze"),
    "resnet18": (12, "4 streams, 8 blocks"),
    "resnext50_32x4d": (53, "stem, 4 streams, 16 blocks of groups and units into and out of them"),
    "shufflenet_v2_x0_5": (80, "parts of parts: every unit passes half of the shuffled channels on as they are"),
    "squeezenet1_1": (25, "stem, 8 fire modules of squeeze and two expansions"),
    "swin_t": (52, "4 streams, 12 blocks of heads, q/k, v/o and hidden layer"),
    "swin_v2_t": (64, "as Swin, and the hidden layer of 12 position networks"),
    "vgg11": (10, "8 convolutions, 2 hidden linear layers"),
    "vgg11_bn": (10, "8 convolutions, 2 hidden linear layers"),
    "vit_b_32": (49, "the stream, 12 blocks of heads, q/k, v/o and hidden layer"),
    "wide_resnet50_2": (37, "stem, 4 streams, 16 blocks of 2"),
}
_QUICK = ("squeezenet1_1", "mobilenet_v3_small")
_SLOW = [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in ZOO]


@pytest.mark.parametrize("name", _SLOW)
def test_smallest_member_of_every_family_is_exact(name: str) -> None:
    entry, spec = survey(name)
    assert entry.error < 1e-9
    assert entry.coverage >= 0.9
    assert entry.groups == ZOO[name][0], str(spec)
    assert not [pin for pin in spec.pins if "no rule" in pin.reason]


def test_every_family_has_a_member_here() -> None:
    """A family is the part of a name before its size."""
    marks = sorted(ZOO, key=len)
    stems = {name: name.rstrip("0123456789").split("_")[0].rstrip("0123456789") for name in marks}
    assert {name.split("_")[0].rstrip("0123456789") for name in classifiers()} <= set(stems.values())
