"""One round on state dicts: align the replies, and finish what the wrapped strategy made of them.

The current and the legacy strategy are two dialects of this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from logging import ERROR, WARNING
from time import perf_counter
from typing import Any, Generic, TypeVar

import torch
from flwr.supercore import log
from torch import nn

from c2m3_fl.core.permutation import Permutation, identity
from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import check_finite
from c2m3_fl.errors import CalibrationError, ConfigError, ParamsError
from c2m3_fl.flower.aligner import Aligner, with_cpu_fallback
from c2m3_fl.flower.client_repair import ClientStatistics, check_measurable
from c2m3_fl.flower.inputs import check_calibration
from c2m3_fl.flower.options import Options, resolved, resolved_device
from c2m3_fl.flower.replies import Dropped, Reply, Sorted, report_dropped
from c2m3_fl.flower.reports import (
    KEPT,
    Numbers,
    aligned_numbers,
    failure,
    report_alignment,
    report_kept,
    report_recalibration,
)
from c2m3_fl.flower.wrapped import ignores_weights, restored, rewinding, typed_like
from c2m3_fl.merging.recalibrate.auto import Auto
from c2m3_fl.merging.recalibrate.registry import Recalibration, recalibrated, resolve
from c2m3_fl.merging.recalibrate.setting import prepare
from c2m3_fl.merging.recalibrate.shift import OwnMoments, with_own_moments
from c2m3_fl.merging.reports import Recalibrated
from c2m3_fl.network.calibration import Calibration, ExampleInputs, first_inputs
from c2m3_fl.network.moments import Moments
from c2m3_fl.symmetry.discover import permutation_spec

Metrics = TypeVar("Metrics")


@dataclass(frozen=True, eq=False)
class Aligned:
    """The replies that go to the wrapped strategy, their aligned params, and the numbers of the round so far."""

    replies: tuple[Reply[Any], ...]
    params: tuple[Params, ...]
    moves: tuple[Permutation, ...]
    dropped: tuple[Dropped, ...]
    numbers: Numbers
    plain: Params | None = None  # what the wrapped strategy makes of them unaligned, where a guard wants to know

    @property
    def nodes(self) -> list[int]:
        """Who replied."""
        return [reply.node for reply in self.replies]

    @property
    def weights(self) -> list[float]:
        """Averaging weights."""
        return [reply.weight for reply in self.replies]


Finish = Callable[[Params, Aligned], Recalibrated]


@dataclass(frozen=True, eq=False)
class Outcome(Generic[Metrics]):
    """How a round ended.

    Attributes
    ----------
    params : mapping of str to Tensor, optional
        The new global model; None where the previous one stays.
    metrics : optional
        Those of the wrapped strategy.
    numbers : Numbers
        Ours.
    """

    params: Params | None
    metrics: Metrics | None
    numbers: Numbers


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
        What to do with them: "none", "repair", or any other name or object that `merge` takes.
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
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model is {model!r}, expected a module such as Net()")
        self.options = resolved(options)
        self.model = model
        self.calibration = calibration
        self.recalibration = resolve(recalibrate)
        if calibration is None and self.recalibration is not None and recalibrate != "repair":  # which is the default
            raise CalibrationError(f"recalibrate={recalibrate!r} needs calibration inputs: pass calibration")
        self.device = resolved_device(device)
        self.example_inputs = example_inputs
        self.idle = 0  # rounds in a row in which nothing was aggregated
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

    @property
    def holds_data(self) -> bool:
        """Whether merged models are recalibrated with data that the server holds."""
        return self.calibrated and not isinstance(self.calibration, ClientStatistics)

    def play(
        self,
        found: Sorted[Any],
        sent: Params,
        strategy: object,
        aggregate: Callable[[Aligned], tuple[Params | None, Metrics | None]],
        finish: Finish | None = None,
    ) -> Outcome[Metrics]:
        """One round, from checked replies to the new global model; whatever fails, the round ends in order.

        Parameters
        ----------
        found : Sorted
            The usable replies and the others.
        sent : mapping of str to Tensor
            The model that was sent out, in its own element types.
        strategy : Strategy
            The wrapped strategy, taken back to where it was when its result is no use.
        aggregate : callable
            From the aligned replies to the wrapped strategy's arrays and metrics.
        finish : callable, optional
            How to recalibrate when the server holds no data.
        """
        report_dropped(found.dropped)
        counts: Numbers = {"c2m3-replies": len(found.replies), "c2m3-dropped": len(found.dropped)}
        counts["c2m3-check-seconds"] = found.seconds
        if not self._enough(found.replies):
            return self._keep(f"{len(found.replies)} valid replies are too few", counts)
        try:
            aligned = self.align(found.replies, sent, equally=ignores_weights(strategy))
        except Exception as error:  # a round is not worth a run
            return self._keep(failure("the alignment", error), counts, level=ERROR)
        report_dropped(aligned.dropped)
        counts = {**counts, **aligned.numbers, "c2m3-dropped": len(found.dropped) + len(aligned.dropped)}
        if not self._enough(aligned.replies):
            return self._keep(f"{len(aligned.replies)} replies that fit each other are too few", counts)
        rewind, started = rewinding(strategy), perf_counter()
        metrics: Metrics | None = None
        aligned = replace(aligned, plain=self._plain(aligned, aggregate, rewind))
        try:
            arrays, metrics = aggregate(aligned)
            merged = None if arrays is None else restored(arrays, [reply.params for reply in aligned.replies])
        except ParamsError as error:
            rewind()
            return self._keep(str(error), counts, metrics)
        except Exception as error:  # say, a trimmed mean that trims more than there is
            rewind()
            reason = failure(f"the wrapped strategy {type(strategy).__name__}", error)
            return self._keep(reason, counts, metrics, level=ERROR)
        if merged is None:
            return self._keep("the wrapped strategy returned no arrays", counts, metrics)
        self.idle = 0
        counts["c2m3-aggregate-seconds"] = perf_counter() - started
        result, numbers = self.recalibrate(merged, aligned, finish)
        return Outcome(result, metrics, {**counts, **numbers, KEPT: 0})

    def _plain(
        self,
        aligned: Aligned,
        aggregate: Callable[[Aligned], tuple[Params | None, Metrics]],
        rewind: Callable[[], None],
    ) -> Params | None:
        """What the wrapped strategy makes of the replies as they came: one more candidate for a guard."""
        if not (self.calibrated and isinstance(self.recalibration, Auto)):
            return None
        raw = [reply.params for reply in aligned.replies]
        try:
            arrays, _ = aggregate(replace(aligned, params=tuple(raw)))
            return None if arrays is None else restored(arrays, raw)
        except Exception as error:  # it will raise again on the aligned replies, where that is dealt with
            log(WARNING, "\t> no plain result to compare with: %s", error)
            return None
        finally:
            rewind()

    def _enough(self, replies: Sequence[object]) -> bool:
        """Whether the valid replies reach the stated minimum."""
        return len(replies) >= self.options["min_replies"]

    def _keep(
        self, reason: str, counts: Numbers, metrics: Metrics | None = None, *, level: int = WARNING
    ) -> Outcome[Metrics]:
        """A round in which nothing was aggregated leaves the global model as it was."""
        self.idle += 1
        report_kept(reason, self.idle, level)
        return Outcome(None, metrics, {**counts, KEPT: 1})

    def align(self, replies: Sequence[Reply[Any]], sent: Params, *, equally: bool = False) -> Aligned:
        """Bring replies into one basis, `equally` whatever their weights, and name those that do not fit the others."""
        nodes = [reply.node for reply in replies]
        weights = [1.0 if equally else reply.weight for reply in replies]
        alignment = self.aligner.align(nodes, [reply.params for reply in replies], weights, sent)
        odd = alignment.fit.outliers()
        numbers = aligned_numbers(nodes, alignment, odd)
        if self.options["diagnostics"]:
            numbers |= {f"c2m3-agreement/{name}": layer.tolist() for name, layer in alignment.fit.layers.items()}
        report_alignment(nodes, alignment, odd)
        left_out = set(odd) if self.options["outliers"] == "drop" else set()
        kept = [index for index in range(len(replies)) if index not in left_out]
        return Aligned(
            tuple(replies[index] for index in kept),
            tuple(alignment.params[index] for index in kept),
            tuple(alignment.moves[index] for index in kept),
            tuple(Dropped(nodes[index], "does not fit the other replies") for index in sorted(left_out)),
            numbers,
        )

    def recalibrate(self, merged: Params, aligned: Aligned, finish: Finish | None = None) -> tuple[Params, Numbers]:
        """Recalibrate the merged model; the merged model itself, with a word in the log, where that fails."""
        finish = finish or (self.recalibrated if self.holds_data else None)
        if finish is None:
            return merged, {}
        started = perf_counter()
        typed = typed_like(aligned.replies[0].params, merged)
        try:
            found = finish(typed, aligned)
            check_finite(found.state_dict)
        except Exception as error:  # what was aggregated is worth more than its repair
            log(ERROR, "\t> %s: the merged model stays as it is", failure("recalibration", error))
            return merged, {"c2m3-repaired": 0, "c2m3-repair-seconds": perf_counter() - started}
        numbers = report_recalibration(found.report)
        changed = any(not torch.equal(value, typed[name]) for name, value in found.state_dict.items())
        return found.state_dict, {
            **numbers,
            "c2m3-repaired": int(changed),
            "c2m3-repair-seconds": perf_counter() - started,
        }

    def recalibrated(self, merged: Params, aligned: Aligned, own: Sequence[OwnMoments] = ()) -> Recalibrated:
        """Recalibrate with the server's data, and with each node's moments on its own data where they are known."""
        calibration, recalibration = self.calibration, self.recalibration
        if calibration is None or recalibration is None or isinstance(calibration, ClientStatistics):
            raise ConfigError("there is nothing to recalibrate with on this server")

        def compute(device: torch.device) -> Recalibrated:
            setting = prepare(
                self.model,
                merged,
                aligned.params,
                calibration,
                weights=aligned.weights,
                example_inputs=self.example_inputs,
                device=device,
                plain=aligned.plain,
            )
            if own:
                here = [{name: _moved(each, device) for name, each in moments.items()} for moments in own]
                setting = with_own_moments(setting, self.spec, [identity(self.spec)] * len(here), here)
            found = recalibrated(recalibration, setting)
            return replace(found, state_dict={name: value.cpu() for name, value in found.state_dict.items()})

        return with_cpu_fallback(compute, self.device, "recalibration")[0]


def _moved(moments: Moments, device: torch.device) -> Moments:
    return replace(moments, mean=moments.mean.to(device), deviation=moments.deviation.to(device))
