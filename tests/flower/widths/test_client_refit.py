"""Refit from clients of several widths: what a server would solve that holds all data and runs each network itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from c2m3_fl.core.permutation import identity
from c2m3_fl.errors import ConfigError
from c2m3_fl.flower import C2M3, ClientRefit
from c2m3_fl.flower.deploying import candidates
from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.widths.padding import Padding, check_padding, computes_alike
from c2m3_fl.merging.recalibrate.from_clients.pool import outlying
from c2m3_fl.merging.recalibrate.from_clients.sketch import Centred, SketchedFit
from c2m3_fl.merging.recalibrate.from_clients.sums import FitAnswer, MomentsAnswer
from c2m3_fl.merging.recalibrate.ridge import Sums
from c2m3_fl.merging.widths.injections import injection
from c2m3_fl.merging.widths.networks import Widths
from c2m3_fl.network.moments import Moments
from tests.flower.federation import EXAMPLE, digits, mlp, share
from tests.flower.queries.server_solve import refit_on_a_server
from tests.flower.widths.federation import WIDTHS
from tests.flower.widths.refits import ALL, answering, federation, normed, one_round
from tests.merging.networks import ChannelNorm
from tests.merging.widths.networks import WideAttention, WideResidual, transposed
from tests.merging.widths.networks import mlp as activated


def convolutional(seed=0, width=32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            *(nn.Conv2d(1, width // 4, 3, padding=1), nn.Sigmoid()),  # dead units give .5, and zeros beyond the border
            *(nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(16 * (width // 2), 10)),
        )
        model[1].weight.data *= 5
    return model


def by_class(context):
    """Classes 0 to 2, 3 to 5 and 6 to 9."""
    images, labels = (each[:300] for each in digits())
    own = labels.clamp(0, 8) // 3 == int(context.node_config["partition-id"])
    return [(images[own], labels[own])]


def outputs(model, params):
    with torch.no_grad():
        return torch.func.functional_call(model.eval(), dict(params), (digits()[0],))


def close(found, expected):
    return float((found - expected).norm()) <= 1e-5 * float(expected.norm())


def group_of(spec, index):
    """The group of a layer's output channels; "" for class scores."""
    (segment,) = spec.tensors[f"{index}.weight"].axes[0] or [None]
    return segment.group if segment else ""


def _heard(monkeypatch):
    """What refits of the whole model are given."""
    asked, whole = [], candidates.refit_by_replies
    monkeypatch.setattr(
        candidates, "refit_by_replies", lambda *given, **more: asked.append(given) or whole(*given, **more)
    )
    return asked


@pytest.mark.parametrize(("make", "data"), [(mlp, share), (mlp, by_class), (convolutional, by_class)])
def test_it_is_the_solve_of_a_server_that_runs_each_network_at_its_own_width(make, data, monkeypatch):
    """Of the whole model, and of its restriction to every narrower width."""
    asked, strategy = _heard(monkeypatch), federation(make, recalibrate=ALL)
    strategy.server.resizing.note({1: 0, 2: 1, 3: 2})
    grid_app, own = answering(make, data), [make(seed + 1, width) for seed, width in enumerate(WIDTHS)]
    arrays = one_round(strategy, grid_app, [each.state_dict() for each in own], make().state_dict())
    ((_, aligned, *_, merged, weights),) = asked
    spec, model, deployed = strategy.setup.spec, make(), to_params(arrays)
    layers = [index for index, layer in enumerate(model) if isinstance(layer, nn.Linear | nn.Conv2d)]
    own, shares = ([each[node - 1] for node in aligned.nodes] for each in (own, [_joined(data, k) for k in range(3)]))
    places = [
        {index: _channels(spec, index, narrow.units if narrow else move) for index in layers}
        for narrow, move in zip(aligned.narrow, aligned.moves, strict=True)
    ]
    assert len({tuple((each[layers[0]] >= 0).tolist()) for each in places}) == 3
    expected = _solved(model, merged, [(net, net.state_dict()) for net in own], shares, weights, places)
    found, before = outputs(model, deployed), outputs(model, merged)
    assert close(found, expected)
    assert not torch.allclose(found, before, rtol=0, atol=0.05 * float(expected.abs().max()))

    for size, width in enumerate(WIDTHS[1:]):
        cuts = strategy.server.resizing.cuts(deployed, deployed=False)
        narrow, restricted = make(0, width), cuts.params(size + 1)
        kept = {index: _channels(spec, index, cuts.units(size + 1)) for index in layers}
        expected = _solved(narrow, restricted, [(model, deployed)] * 3, shares, weights, [kept] * 3)
        assert close(outputs(narrow, to_params(strategy.at_width(arrays, size))), expected)
        assert not close(outputs(narrow, restricted), expected)


def _channels(spec, index, units):
    name = group_of(spec, index)
    return units[name] if name else torch.arange(spec.tensors[f"{index}.weight"].shape[0])


def _joined(data, partition):
    context = type("Context", (), {"node_config": {"partition-id": partition}})
    return tuple(torch.cat(each) for each in zip(*data(context), strict=True))


def _solved(model, params, own, shares, weights, places):
    networks = []
    for network, state in [(model, params), *own]:
        networks.append(copy.deepcopy(network).double().eval())
        networks[-1].load_state_dict({name: value.double() for name, value in state.items()})
    found = refit_on_a_server(networks[0], networks[1:], shares, weights, ALL.strengths, places)
    return outputs(found.float(), {})


def test_a_network_and_copies_padded_with_dead_units_stay_what_they_are():
    """Every kind of operator: folded and other BatchNorm, other norms, convolutions, linear layers."""
    narrow, wide = normed(1, 16), normed()
    widths = Widths.of([wide, narrow], None, None, example_inputs=EXAMPLE, inputs=None, outputs=None)
    one, two = widths.nodes
    seats = injection(two.spec, one.spec, identity(one.spec))
    padded = Padding(two.spec, one.spec, seats)(narrow.state_dict(), wide.state_dict())
    strategy = C2M3(model=normed(), sizes=[normed(1, 16)], example_inputs=EXAMPLE, deploy="every", recalibrate=ALL)
    strategy.server.resizing.note({1: 1, 2: 0, 3: 1})
    replies = [narrow.state_dict(), padded, narrow.state_dict()]
    arrays = one_round(strategy, answering(normed), replies, padded)
    before = outputs(narrow, {})
    for found in (outputs(wide, to_params(arrays)), outputs(narrow, to_params(strategy.at_width(arrays, 0)))):
        torch.testing.assert_close(found, before, rtol=0, atol=1e-4 * float(before.abs().max()))


@torch.no_grad()
def test_behind_batch_norm_the_moments_of_a_channel_are_those_of_the_networks_that_have_it(monkeypatch):
    asked, strategy = _heard(monkeypatch), federation(normed, recalibrate=ALL)
    strategy.server.resizing.note({1: 0, 2: 1, 3: 2})
    own = [normed(seed + 1, width) for seed, width in enumerate(WIDTHS)]
    arrays = one_round(strategy, answering(normed), [each.state_dict() for each in own], normed().state_dict())
    ((_, aligned, *_, weights),) = asked
    model, sums = normed(), [0.0] * 5
    model.load_state_dict(to_params(arrays))
    pairs = zip(aligned.nodes, aligned.narrow, aligned.moves, weights, strict=True)
    for node, narrow, move, weight in pairs:
        places = _channels(strategy.setup.spec, 1, narrow.units if narrow else move)
        rows, _ = _joined(share, node - 1)
        ours, theirs = model[:3].eval()(rows), own[node - 1][:3].eval()(rows)[:, places.clamp_min(0)]
        count = weight * (places >= 0)
        found = [moment.mean((0, 2, 3)) for side in (ours, theirs) for moment in (side, side.square())]
        sums = [total + count * each for total, each in zip(sums, [torch.ones_like(count), *found], strict=True)]
    count, *moments = sums
    mean, square, own_mean, own_square = (each[count > 0] / count[count > 0] for each in moments)
    torch.testing.assert_close(mean, own_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(square, own_square, rtol=1e-4, atol=1e-5)
    assert len(count.unique()) > 2


IMAGES = torch.zeros(2, 3, 8, 8)


def _widths(make):
    return Widths.of([make(4), make(2)], None, None, example_inputs=IMAGES, inputs=None, outputs=None).nodes


@pytest.mark.parametrize(
    "make",
    [
        *(lambda width, kind=kind: activated(width, kind) for kind in (nn.ReLU, nn.Sigmoid)),
        lambda width: WideResidual(nn.BatchNorm2d, width),
        lambda width: WideResidual(lambda channels: nn.BatchNorm2d(channels, affine=False), width),
        WideAttention,
        transposed,
    ],
)
def test_a_padded_network_computes_what_the_narrow_one_computes(make):
    wide, narrow = (each for each in _widths(make))
    check_padding([wide, narrow], ALL)
    units = injection(narrow.spec, wide.spec, identity(wide.spec))
    padded = Padding(narrow.spec, wide.spec, units)(narrow.held.model.state_dict(), wide.held.model.state_dict())
    images = torch.randn(4, *IMAGES.shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = narrow.held.model.eval()(images)
        found = torch.func.functional_call(wide.held.model.eval(), padded, (images,))
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    *_, last = padded
    broken = {**padded, last: padded[last] + 0.1}
    assert not computes_alike(wide, narrow, broken, narrow.held.model.state_dict())


@pytest.mark.parametrize("norm", [ChannelNorm, lambda channels: nn.GroupNorm(2, channels)])
def test_norms_over_units_are_refused_by_name(norm):
    networks = [WideResidual(norm, width) for width in (4, 2)]
    with pytest.raises(ConfigError, match=r"sizes\[0\] then computes something else \(norm, norm1, norm2 divide by"):
        C2M3(model=networks[0], sizes=networks[1:], example_inputs=IMAGES, recalibrate=ClientRefit())
    C2M3(model=networks[0], sizes=networks[1:], example_inputs=IMAGES)


class Gated(nn.Module):
    """A norm over units behind a gain that is small at the start; with `affine` it has weights of its own."""

    def __init__(self, width, *, affine, gain=0.0, shortcut=1.0):
        super().__init__()
        self.enter, self.hidden = nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 1)
        self.norm, self.head = nn.LayerNorm(width, elementwise_affine=affine), nn.Conv2d(width, 3, 1)
        self.gain = nn.Parameter(torch.full((), gain))
        self.shortcut = shortcut

    def forward(self, images):
        rows = torch.relu(self.enter(images))
        normed = self.norm(rows.movedim(1, -1)).movedim(-1, 1)
        return self.shortcut * images + self.head(rows + self.gain * torch.relu(self.hidden(normed)))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("hides", [{"gain": 1e-6}, {"gain": 0.01, "shortcut": 1e3}])
def test_norms_over_units_are_refused_whatever_hides_them(affine, hides):
    networks = [Gated(width, affine=affine, **hides) for width in (4, 2)]
    with pytest.raises(ConfigError, match=r"sizes\[0\] then computes something else"):
        C2M3(model=networks[0], sizes=networks[1:], example_inputs=IMAGES, recalibrate=ClientRefit())


def test_a_network_of_low_precision_is_no_other_one_when_padded():
    networks = [activated(width).half() for width in (32, 16)]
    C2M3(model=networks[0], sizes=networks[1:], example_inputs=IMAGES.half(), recalibrate=ClientRefit())


def test_targets_are_compared_per_channel_that_a_client_has():
    """Channels of one power each: of the narrow client a thousandth, and in one case of less power."""
    owned = {1: torch.arange(1000) < 1000, 2: torch.arange(1000) < 1000, 3: torch.arange(1000) < 1}

    def answers(power):
        scale = {1: 1.0, 2: 1.0, 3: power}
        rr = {node: scale[node] * mask.double()[None] for node, mask in owned.items()}
        empty = torch.zeros(1, 1000, dtype=torch.float64)
        x, xx, xr = torch.zeros(1, 1).double(), torch.ones(1, 1, 1).double(), torch.zeros(1, 1, 1000).double()
        yield {node: FitAnswer(*[Sums(1, x, empty, xx, xr, each)] * 2) for node, each in rr.items()}
        yield {
            node: MomentsAnswer(Moments(1, empty[0], empty[0] + 1), Moments(1, empty[0], r[0]))
            for node, r in rr.items()
        }
        sketch = {node: Centred(1, x, (empty,), xx, (each.sqrt()[:, None],)) for node, each in rr.items()}
        yield {node: SketchedFit(each, each) for node, each in sketch.items()}

    for alike, weak in zip(answers(1.0), answers(1e-4), strict=True):
        assert outlying(alike).keys() == {3}
        assert not outlying(alike, None, owned)
        assert outlying(weak, None, owned).keys() == {3}
