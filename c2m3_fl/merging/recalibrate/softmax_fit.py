"""Fit class scores: softmax regression towards given probabilities, without a learning rate.

Böhning (1992) bounds the Hessian of softmax regression by half the Gram matrix of the inputs, for every class alike.
Newton steps with that bound need a single factorisation, and no step worsens the fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS = 100  # per strength, from the strongest to the weakest, each fit starting from the previous one
_EXACT = 1e-9  # a smaller divergence is float32 rounding
_GAIN = 1e-3  # a smaller relative decrease of the held-out divergence is noise


@dataclass(frozen=True)
class Classified:
    """Inputs of a last layer, and the target probabilities of its outputs.

    Attributes
    ----------
    x : Tensor of float64, shape (count, inputs)
        Inputs.
    goal : Tensor of float64, shape (count, classes)
        Probabilities; rows sum to one.
    """

    x: Tensor
    goal: Tensor

    def combine(self, other: Classified) -> Classified:
        """Both sets of rows."""
        return Classified(torch.cat([self.x, other.x]), torch.cat([self.goal, other.goal]))

    def divergence(self, layer: Layer) -> float:
        """Mean Kullback-Leibler divergence of the layer's probabilities from the goal."""
        surprise = torch.special.xlogy(self.goal, self.goal) - self.goal * layer(self.x).log_softmax(-1)
        return float(surprise.sum(-1).mean())


@dataclass(frozen=True)
class Layer:
    """An affine layer: a weight of shape (inputs, classes) and a bias of shape (classes,), both of float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Scores of shape (count, classes)."""
        return x @ self.weight + self.bias


@dataclass(frozen=True)
class ScoreFit:
    """A fitted last layer.

    Attributes
    ----------
    layer : Layer
        Weight and bias.
    strength : float
        The chosen ridge strength, relative to the mean variance of the inputs; infinite if the layer was kept.
    error_before, error : float
        Held-out divergence with the layer kept and with the fit.
    """

    layer: Layer
    strength: float
    error_before: float
    error: float


def choose_scores(
    train: Classified, held_out: Classified, layer: Layer, strengths: Sequence[float], *, bias: bool
) -> ScoreFit:
    """Fit with the strength that predicts held-out rows best, or keep the layer if none is better.

    Parameters
    ----------
    train, held_out : Classified
        Rows of different inputs.
    layer : Layer
        The ridge penalises the distance from its weight. The bias is not penalised; the fit starts at its bias.
    strengths : sequence of float
        Candidates, relative to the mean variance of the inputs.
    bias : bool
        Whether the bias may change.
    """
    before = held_out.divergence(layer)
    found = {strength: held_out.divergence(each) for strength, each in path(train, layer, strengths, bias=bias).items()}
    best = min(found, key=found.__getitem__)
    if before < _EXACT or not found[best] < before * (1 - _GAIN):
        return ScoreFit(layer, float("inf"), before, before)
    stronger = [strength for strength in strengths if strength >= best]
    fitted = path(train.combine(held_out), layer, stronger, bias=bias)[best]
    return ScoreFit(fitted, best, before, found[best])


def path(rows: Classified, layer: Layer, strengths: Sequence[float], *, bias: bool) -> dict[float, Layer]:
    """Layers that minimise ``mean KL(goal | softmax) + ½ strength · scale · |weight - given weight|²``.

    `scale` is the mean variance of the inputs, so that a strength means the same for every layer.

    Parameters
    ----------
    rows : Classified
        Inputs and the probabilities to fit.
    layer : Layer
        The ridge penalises the distance from its weight; the fit starts there.
    strengths : sequence of float
        Ridge strengths; the fits go from the strongest to the weakest.
    bias : bool
        Whether the bias may change.
    """
    centre = float(bias) * rows.x.mean(0)
    x = rows.x - centre
    gram = x.T @ x / len(x)
    scale = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    change, offset = torch.zeros_like(layer.weight), layer.bias + centre @ layer.weight
    found = {}
    for strength in sorted(strengths, reverse=True):
        factor, failed = torch.linalg.cholesky_ex(gram / 2 + strength * scale * eye)
        if int(failed):  # the ridge is too weak for a factorisation in float64
            continue
        for _ in range(_STEPS):
            missing = rows.goal - (x @ (layer.weight + change) + offset).softmax(-1)
            change = change + torch.cholesky_solve(x.T @ missing / len(x) - strength * scale * change, factor)
            offset = offset + float(bias) * 2 * missing.mean(0)
        found[strength] = Layer(layer.weight + change, offset - centre @ (layer.weight + change))
    return found


def balance(means: Tensor, weights: Tensor, floor: float) -> Tensor:
    """Divisors of the endpoints' mean probabilities, per class, that remove class priors on which they disagree.

    Endpoints trained on different label distributions have different class priors, and their mean probability favours
    classes that many endpoints know, or that a few predict with high confidence. Divided by its mean over all inputs,
    it has a uniform prior. The divisor is raised to the power of the endpoints' mean distance from their mean, at most
    one, so that a class that is rare for all endpoints stays rare.

    Parameters
    ----------
    means : Tensor of float64, shape (endpoints, classes)
        Each endpoint's mean probabilities over all inputs.
    weights : Tensor of float64, shape (endpoints,)
        Averaging weights.
    floor : float
        Lower bound of a class's mean, relative to equal shares.
    """
    share = weights.to(means.device)[:, None]
    mean = (share * means).sum(0)
    disagreement = float((share * (means - mean).abs()).sum())
    prior: Tensor = mean.clamp_min(floor / len(mean)) ** min(1.0, disagreement)
    return prior
