"""Scores of networks, and of affine combinations of networks, on labelled data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor, nn

from c2m3_fl.core.spec import Params, floating
from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.merging.recalibrate.repair import BatchNormStatistics
from c2m3_fl.merging.recalibrate.setting import Setting, check_params, prepare
from c2m3_fl.network.calibration import Batch, Calibration, ExampleInputs, load_batches
from c2m3_fl.network.calls import tensors_in
from c2m3_fl.network.copying import private_copy
from c2m3_fl.network.program import feeding


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy and accuracy on labelled data."""

    loss: float
    accuracy: float


def evaluate(model: nn.Module, params: Params, batches: Sequence[Batch]) -> Score:
    """Score a state dict on labelled batches.

    Parameters
    ----------
    model : nn.Module
        The architecture, in the mode to score it in.
    params : mapping of str to Tensor
        State dict of the network.
    batches : sequence of Batch
        Labelled data.

    Raises
    ------
    CalibrationError
        When a batch has no labels, or the network cannot take it.
    """
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for batch in batches:
            if batch.labels is None:
                raise CalibrationError("barriers need labelled data: batches of (inputs, class indices)")
            with feeding(batch, params):
                found = tuple(
                    tensors_in(torch.func.functional_call(model, dict(params), *batch.call, tie_weights=False))
                )
            if len(found) != 1:
                raise CalibrationError(
                    f"the network gives {len(found)} outputs, expected class scores alone: name them with --outputs, "
                    "or pass a module that returns them alone"
                )
            logits = found[0]
            with feeding(batch, params):
                loss += float(nn.functional.cross_entropy(logits, batch.labels, reduction="sum"))
            correct += int((logits.argmax(1) == batch.labels).sum())
            count += len(batch.labels)
    return Score(loss / count, correct / count)


class ScorerOptions(TypedDict, total=False):
    """Options that `barrier`, `simplex` and `landscape` pass to `Scorer`."""

    example_inputs: ExampleInputs | None
    inputs: Sequence[str] | None
    renormalise: bool | None


class Scorer:
    """Scores affine combinations of networks.

    The networks themselves are scored unchanged. For any other combination the averaged running statistics of
    BatchNorm are wrong: they are re-estimated on the inputs that are scored.

    Parameters
    ----------
    model : nn.Module
        The architecture; not mutated.
    nodes : sequence of mappings of str to Tensor
        The networks.
    data : iterable of labelled batches
        What to score on.
    example_inputs : Tensor, tuple or dict, optional
        A tuple or dict says how many inputs the network takes; otherwise one.
    inputs : sequence of str, optional
        The keys of dict batches that are inputs: see `load_batches`.
    renormalise : bool, optional
        Whether to re-estimate BatchNorm; by default if one keeps running statistics.

    Raises
    ------
    ParamsError, CalibrationError
        When networks or data do not fit.
    ConfigError
        When `renormalise` is True and there is nothing to re-estimate.
    """

    def __init__(
        self,
        model: nn.Module,
        nodes: Sequence[Params],
        data: Calibration,
        *,
        example_inputs: ExampleInputs | None = None,
        inputs: Sequence[str] | None = None,
        renormalise: bool | None = None,
    ) -> None:
        for index, node in enumerate(nodes):
            check_params(model, node, f"node {index}")
        self.nodes = nodes
        self.names = floating(nodes[0])
        self._twin = private_copy(model).to(next(iter(nodes[0].values())).device).eval()
        self._batches = load_batches(
            data,
            model=model,
            example_inputs=example_inputs,
            inputs=inputs,
            device=next(iter(nodes[0].values())).device,
        )
        normed = any(name.endswith("running_var") for name in nodes[0])
        if renormalise and not normed:
            raise ConfigError(
                f"{type(model).__name__} keeps no running statistics to re-estimate; leave renormalise out"
            )
        self._setting: Setting | None = None
        if normed and renormalise is not False:
            self._setting = prepare(self._twin, nodes[0], [nodes[0]], self._batches)

    def score(self, weights: Sequence[float]) -> Score:
        """Score the networks' combination with these weights, which sum to one and may be negative."""
        if max(weights) == sum(map(abs, weights)):  # one of the networks
            return evaluate(self._twin, self.nodes[list(weights).index(max(weights))], self._batches)
        mixed = self._mixed(weights)
        if self._setting is not None:
            mixed = BatchNormStatistics()(replace(self._setting, merged=mixed)).state_dict
        return evaluate(self._twin, mixed, self._batches)

    def _mixed(self, weights: Sequence[float]) -> dict[str, Tensor]:
        """Affine combination; variances stay positive, integers are those of the first network."""
        result = dict(self.nodes[0])
        for name in self.names:
            total = torch.zeros_like(self.nodes[0][name], dtype=torch.float64)
            for weight, node in zip(weights, self.nodes, strict=True):
                total += weight * node[name].double()
            kept = total.clamp_min(0) if name.endswith("running_var") else total
            result[name] = kept.to(self.nodes[0][name].dtype)
        return result
