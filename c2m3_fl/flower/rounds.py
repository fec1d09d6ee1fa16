"""One round on state dicts: align the replies, and finish what the wrapped strategy made of them.

The current and the legacy strategy are two dialects of this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from logging import INFO, WARNING
from time import perf_counter
from typing import Any

import torch
from flwr.supercore import log
from torch import Tensor, nn

from c2m3_fl.core import permutation
from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.spec import Params
from c2m3_fl.errors import C2M3Error, ConfigError, ParamsError
from c2m3_fl.flower.alignment import Aligner, Alignment, with_cpu_fallback
from c2m3_fl.flower.inputs import check_calibration
from c2m3_fl.flower.options import Options, resolved
from c2m3_fl.flower.replies import Dropped, Reply, check_finite
from c2m3_fl.flower.statistics import ClientStatistics, check_measurable
from c2m3_fl.merging.recalibrate import Recalibration, recalibrated, resolve
from c2m3_fl.merging.reports import Recalibrated, RecalibrationReport
from c2m3_fl.merging.setting import prepare
from c2m3_fl.models.calibration import Calibration, ExampleInputs, first_inputs
from c2m3_fl.models.symmetry import permutation_spec

Numbers = dict[str, float | int | list[float] | list[int]]
Finish = Callable[[Params, Sequence[Params], Sequence[float]], Recalibrated]


@dataclass(frozen=True, eq=False)
class Aligned:
    """The replies that go to the wrapped strategy, their aligned params, and the numbers of the round so far."""

    replies: tuple[Reply[Any], ...]
    params: tuple[Params, ...]
    moves: tuple[Permutation, ...]
    dropped: tuple[Dropped, ...]
    numbers: Numbers

    @property
    def weights(self) -> list[float]:
        """Averaging weights."""
        return [reply.weight for reply in self.replies]


class Rounds:
    """Aligns replies and finishes aggregates, round after round.

    Parameters
    ----------
    model : nn.Module
        The architecture; not mutated.
    example_inputs : Tensor or tuple of Tensor, optional
        Inputs that the network can be traced with; by default the first calibration batch.
    calibration : iterable of batches or ClientStatistics, optional
        Inputs for recalibration, or who measures instead.
    recalibrate : str or Recalibration
        What to do with them: "none", "repair", or any other name or object that `c2m3_fl.merging.recalibrate` knows.
    device : torch.device or str, optional
        Where to compute; by default CUDA when there is one, else the CPU.
    options : Options
        See there.

    Raises
    ------
    ConfigError, CalibrationError, TraceError
        For unknown options, unusable calibration data, or a model that cannot be exported.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs | None,
        calibration: Calibration | ClientStatistics | None,
        recalibrate: Recalibration | str,
        device: torch.device | str | None,
        options: Options,
    ) -> None:
        self.options = resolved(options)
        self.model = model
        self.calibration = calibration
        self.recalibration = resolve(recalibrate)
        self.device = _device(device)
        self.example_inputs = example_inputs
        held = None if isinstance(calibration, ClientStatistics) else calibration
        if held is not calibration:
            check_measurable(self.recalibration)
        if held is not None:
            check_calibration(model, held, example_inputs)
        self.inputs = first_inputs(held, example_inputs)
        self.spec = permutation_spec(model, self.inputs)
        self.aligner = Aligner(
            self.spec,
            mode=self.options["alignment"],
            basis=self.options["basis"],
            memory=self.options["memory"],
            device=self.device,
            max_steps=self.options["max_steps"],
            tolerance=self.options["tolerance"],
        )

    @property
    def calibrated(self) -> bool:
        """Whether merged models are recalibrated."""
        return self.calibration is not None and self.recalibration is not None

    def enough(self, count: int) -> bool:
        """Whether `count` valid replies reach the stated minimum."""
        return count >= self.options["min_replies"]

    def align(self, replies: Sequence[Reply[Any]], sent: Params, *, equally: bool = False) -> Aligned:
        """Bring replies into one basis, `equally` whatever their weights, and name those that do not fit the others."""
        nodes = [reply.node for reply in replies]
        weights = [1.0 if equally else reply.weight for reply in replies]
        alignment = self.aligner.align(nodes, [reply.params for reply in replies], weights, sent)
        odd = alignment.fit.outliers()
        numbers = _numbers(nodes, alignment, odd)
        if self.options["diagnostics"]:
            numbers |= {f"c2m3-agreement/{name}": layer.tolist() for name, layer in alignment.fit.layers.items()}
        _report(nodes, alignment, odd)
        left_out = set(odd) if self.options["outliers"] == "drop" else set()
        kept = [index for index in range(len(replies)) if index not in left_out]
        return Aligned(
            tuple(replies[index] for index in kept),
            tuple(alignment.params[index] for index in kept),
            tuple(alignment.moves[index] for index in kept),
            tuple(Dropped(nodes[index], "does not fit the other replies") for index in sorted(left_out)),
            numbers,
        )

    def restore(self, aggregated: Params, aligned: Aligned) -> dict[str, Tensor]:
        """What the wrapped strategy returned, with the key order and element types of the replies.

        Integer and boolean tensors take the largest reply's value: no strategy's arithmetic is for them.

        Raises
        ------
        ParamsError
            When tensors are missing, of another shape or not finite.
        """
        first = aligned.replies[0].params
        if aggregated.keys() != first.keys():
            differing = sorted(aggregated.keys() ^ first.keys())
            raise ParamsError(f"the wrapped strategy's result differs from the replies in keys {differing[:5]}")
        counters = [name for name, value in first.items() if not value.is_floating_point()]
        largest = weighted_mean([{name: reply.params[name] for name in counters} for reply in aligned.replies])
        result = {}
        for name, value in first.items():
            if aggregated[name].shape != value.shape:
                shapes = f"{tuple(aggregated[name].shape)}, expected {tuple(value.shape)}"
                raise ParamsError(f"the wrapped strategy's result: {name!r} has shape {shapes}")
            result[name] = largest[name] if name in largest else aggregated[name].to(value.dtype)
        check_finite(result)
        return result

    def recalibrate(self, merged: Params, aligned: Aligned, finish: Finish | None = None) -> tuple[Params, Numbers]:
        """Recalibrate the merged model; the merged model itself, with a word in the log, where that fails."""
        finish = finish or (self._recalibrated if self.calibrated else None)
        if finish is None:
            return merged, {}
        started = perf_counter()
        try:
            found = finish(merged, aligned.params, aligned.weights)
            check_finite(found.state_dict)
        except (C2M3Error, torch.OutOfMemoryError) as error:
            log(WARNING, "\t> recalibration failed, the merged model stays as it is: %s", error)
            return merged, {"c2m3-repaired": 0, "c2m3-repair-seconds": perf_counter() - started}
        numbers = _decided(found.report)
        changed = any(not torch.equal(value, merged[name]) for name, value in found.state_dict.items())
        return found.state_dict, {
            **numbers,
            "c2m3-repaired": int(changed),
            "c2m3-repair-seconds": perf_counter() - started,
        }

    def _recalibrated(self, merged: Params, endpoints: Sequence[Params], weights: Sequence[float]) -> Recalibrated:
        calibration, recalibration = self.calibration, self.recalibration
        if calibration is None or recalibration is None or isinstance(calibration, ClientStatistics):
            raise ConfigError("there is nothing to recalibrate with on this server")

        def compute(device: torch.device) -> Recalibrated:
            setting = prepare(
                self.model,
                merged,
                endpoints,
                calibration,
                weights=weights,
                example_inputs=self.example_inputs,
                device=device,
            )
            found = recalibrated(recalibration, setting)
            return replace(found, state_dict={name: value.cpu() for name, value in found.state_dict.items()})

        return with_cpu_fallback(compute, self.device, "recalibration")[0]


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found).cpu()  # fails on "meta" as well, which has no values to compute with
    except Exception as error:
        raise ConfigError(f"device is {device!r}, which cannot be used here: {error}") from error
    return found


def _numbers(nodes: Sequence[int], alignment: Alignment, odd: Sequence[int]) -> Numbers:
    moved = [permutation.share_moved(move) for move in alignment.moves]
    return {
        "c2m3-objective-before": alignment.objectives[0],
        "c2m3-objective-after": alignment.objectives[1],
        "c2m3-gap": alignment.gap,
        "c2m3-steps": alignment.steps,
        "c2m3-share-moved": sum(moved) / len(moved),
        "c2m3-match-seconds": alignment.seconds,
        "c2m3-on-cpu": int(alignment.on_cpu),
        "c2m3-nodes": list(nodes),
        "c2m3-node-moved": moved,
        "c2m3-node-agreement": alignment.fit.cosines.tolist(),
        "c2m3-node-outlier": [int(index in odd) for index in range(len(nodes))],
        "c2m3-outliers": len(odd),
    }


def _decided(report: RecalibrationReport) -> Numbers:
    """Log what was done and, where a guard chose, on what evidence; the evidence in numbers."""
    decision = report.decision
    if decision is None:
        log(INFO, "\t> recalibration: %s", report.method)
        return {}
    log(INFO, "\t> recalibration: the guard keeps %r: %s", decision.chosen, decision.reason)
    numbers: Numbers = {} if decision.shift is None else {"c2m3-guard-shift": decision.shift}
    for each in decision.candidates:
        numbers[f"c2m3-guard-kept/{each.name}"] = int(each.name == decision.chosen)
        evidence = {"accuracy": each.accuracy, "agreement": each.agreement}
        numbers |= {f"c2m3-guard-{kind}/{each.name}": value for kind, value in evidence.items() if value is not None}
    return numbers


def _report(nodes: Sequence[int], alignment: Alignment, odd: Sequence[int]) -> None:
    before, after = alignment.objectives
    moved = [permutation.share_moved(move) for move in alignment.moves]
    log(
        INFO,
        "\t> C2M3: %d replies aligned in %.2fs: agreement %.6g -> %.6g, %.1f%% of units moved, gap %.1e after %d steps",
        len(nodes),
        alignment.seconds,
        before,
        after,
        100 * sum(moved) / len(moved),
        alignment.gap,
        alignment.steps,
    )
    for index in odd:
        log(
            WARNING,
            "\t> node %d does not fit the others: cosine %.3f, median %.3f; norm %.3g, median %.3g",
            nodes[index],
            alignment.fit.cosines[index],
            alignment.fit.cosines.median(),
            alignment.fit.norms[index],
            alignment.fit.norms.median(),
        )
