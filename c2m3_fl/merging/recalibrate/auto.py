"""The guard: of several networks keep the best by evidence, and say what the evidence was.

Known blind spots. Labels speak for the data they label: where calibration data come from elsewhere, so does their
verdict. The shift of channel moments does not see a change that leaves means and spreads of channels alone.
Agreement with the ensemble is measured on the calibration data, where it improves even while accuracy on the nodes'
own data falls; and where nodes saw few classes each, a refit network is better than their ensemble, which agreement
counts against it. So it is reported, and decides only where nothing better is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.repair import BatchNormStatistics, Repair, recalibration_report
from c2m3_fl.merging.recalibrate.setting import Setting
from c2m3_fl.merging.recalibrate.shift import shift
from c2m3_fl.merging.reports import Candidate, Decision, Recalibrated
from c2m3_fl.network.calibration import Batch
from c2m3_fl.network.program import Walk

# About the geometric mean of the largest shift seen with data of the clients' own distribution, however skewed their
# labels (.25), and the smallest at which refit lost to REPAIR (.95), on held-out training images of MNIST and CIFAR-10.
# On the test images, seen afterwards, the smallest such shift was .64.
LIMIT = 0.5


@dataclass(frozen=True)
class Auto:
    """Do the strongest thing that can be shown to be safe, and report why.

    With labelled calibration data everything competes on them: the plain result without any alignment (where the
    setting has it), the aligned mean, re-estimated BatchNorm statistics, REPAIR and refit. Without labels, refit is
    done where the calibration data are shown to be like the nodes' own (see `recalibrate.shift`) and REPAIR where
    they are shown not to be. Where nothing is known of that, it is REPAIR unless the network that it leaves agrees
    less with the ensemble of the endpoints than a safer one.

    Attributes
    ----------
    limit : float
        Largest shift, in standard deviations of a channel, at which refit is trusted; see `LIMIT`.
    repair, refit : Recalibration
        The candidates; `Repair()` and `Refit()` by default.

    Examples
    --------
    >>> from c2m3_fl.merging.recalibrate.setting import prepare
    >>> model = torch.nn.Linear(4, 3)
    >>> good, bad = model.state_dict(), {name: -value for name, value in model.state_dict().items()}
    >>> inputs = torch.randn(50, 4)
    >>> done = Auto()(prepare(model, bad, [bad, good], [(inputs, model(inputs).argmax(1))], plain=good))
    >>> done.report.decision.chosen, done.report.decision.reason
    ('plain', 'it classifies 100.0% of the labelled calibration inputs correctly')
    """

    limit: float = LIMIT
    repair: Callable[[Setting], Recalibrated] = field(default_factory=Repair)
    refit: Callable[[Setting], Recalibrated] = field(default_factory=Refit)

    def __call__(self, setting: Setting) -> Recalibrated:
        """Recalibrate ``setting.merged``."""
        start = time.perf_counter()
        distance = shift(setting)
        labelled = all(batch.labels is not None for batch in setting.batches)
        done = _as_they_are(setting)
        if any(operator.mean for operator in setting.programs[0].operators):
            done["batchnorm"] = BatchNormStatistics()(setting)
        done["repair"] = self.repair(setting)
        trusted = distance is not None and distance <= self.limit
        if labelled or trusted:
            done["refit"] = self.refit(setting)
        candidates = {name: each.state_dict for name, each in done.items()}
        decision = judge(setting, candidates) if labelled else self._climb(setting, candidates, distance)
        unread = next((batch.unread for batch in setting.batches if batch.unread), "")
        if unread:
            note = f"what follows the inputs, {unread}, is no labels: expected one integer for each input"
            decision = replace(decision, reason=f"{decision.reason}; {note}")
        kept = done[decision.chosen]
        report = replace(
            kept.report,
            method=decision.chosen,
            decision=replace(decision, shift=distance),
            seconds=time.perf_counter() - start,
        )
        return Recalibrated(kept.state_dict, report)

    def _climb(self, setting: Setting, candidates: Mapping[str, Params], distance: float | None) -> Decision:
        """Decide without labels, as said above."""
        decision = judge(setting, candidates)
        if "refit" in candidates:
            return replace(decision, chosen="refit", reason=self._reason(distance))
        better = _safer(decision.candidates) if distance is None else None  # inputs from elsewhere say nothing of it
        if better is None:
            return replace(decision, chosen="repair", reason=self._reason(distance))
        reason = f"REPAIR was held back: it agrees less with the ensemble of the endpoints than {better!r} does"
        return replace(decision, chosen=better, reason=f"{reason}; {self._reason(distance)}")

    def _reason(self, distance: float | None) -> str:
        if distance is None:
            return (
                "nothing shows whether the calibration data are like the nodes' own, so refit was held back; "
                "give labels, or each node's channel_moments"
            )
        if distance <= self.limit:
            return f"the calibration data are like the nodes' own, within {self.limit:g} spreads: {distance:.2f}"
        return (
            f"the calibration data are unlike the nodes' own, beyond {self.limit:g} spreads of a channel: "
            f"{distance:.2f}; so refit was held back"
        )


def _as_they_are(setting: Setting) -> dict[str, Recalibrated]:
    """The candidates that no calibration touches, the safest first."""
    found = {} if setting.plain is None else {"plain": setting.plain}
    return {
        name: Recalibrated(dict(params), recalibration_report(name, setting, (), time.perf_counter()))
        for name, params in {**found, "none": setting.merged}.items()
    }


def _safer(candidates: Sequence[Candidate]) -> str | None:
    """The safer candidate that agrees most with the ensemble, if it agrees more than what REPAIR gives."""
    agreement = {each.name: each.agreement for each in candidates if each.agreement is not None}
    repaired = agreement.pop("repair", None)
    if repaired is None or not agreement:
        return None
    best = max(agreement, key=agreement.__getitem__)
    return best if agreement[best] > repaired else None


def judge(setting: Setting, candidates: Mapping[str, Params]) -> Decision:
    """The best of several networks: by labels where there are any, otherwise by agreement with the ensemble.

    Parameters
    ----------
    setting : Setting
        Calibration data and endpoints.
    candidates : mapping of str to Params
        State dicts by name, the safest first; a later one is chosen only if it is better than all before it,
        or, without labels, at least as good.
    """
    labels = [batch.labels for batch in setting.batches]
    ensemble = _votes(setting, setting.endpoints)
    found = []
    for name, params in candidates.items():
        votes = _votes(setting, [params])
        agreement = None if ensemble is None or votes is None else float((votes == ensemble).double().mean())
        known = [each for each in labels if each is not None]
        accuracy = None
        if votes is not None and len(known) == len(labels) and sum(map(len, known)) == len(votes):
            accuracy = float((votes == torch.cat(known)).double().mean())
        found.append(Candidate(name, accuracy, agreement))
    return _decide(found)


def _decide(found: Sequence[Candidate]) -> Decision:
    best = found[0]
    for each in found[1:]:
        if each.accuracy is not None and best.accuracy is not None:
            better = each.accuracy > best.accuracy
        else:
            better = (each.agreement or 0.0) >= (best.agreement or 0.0)
        best = each if better else best
    if best.accuracy is not None:
        reason = f"it classifies {best.accuracy:.1%} of the labelled calibration inputs correctly"
    elif best.agreement is not None:
        reason = f"it agrees with the ensemble on {best.agreement:.1%} of the calibration inputs"
    else:
        reason = "the outputs are no class scores, so nothing else was compared"
    return Decision(best.name, reason, None, tuple(found))


def _check_labels(batch: Batch, classes: int) -> None:
    labels = batch.labels
    if labels is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise CalibrationError(
            f"calibration batch {batch.index}: labels from {int(labels.min())} to {int(labels.max())}, expected class "
            f"indices from 0 to {classes - 1}: the network gives {classes} scores"
        )


def _votes(setting: Setting, networks: Sequence[Params]) -> Tensor | None:
    """Class that the networks together give every calibration input; None where outputs are no class scores."""
    share = setting.weights if len(networks) == len(setting.weights) else torch.ones(1)
    votes = []
    with torch.no_grad():
        for program, batch in zip(setting.programs, setting.batches, strict=True):
            total: Tensor | None = None
            for params, weight in zip(networks, share.tolist(), strict=True):
                outputs = Walk(program, params, batch).finish()
                scores = outputs[0] if isinstance(outputs, (tuple, list)) and len(outputs) == 1 else outputs
                if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] < 2:
                    return None
                part = weight * scores.double().softmax(1)
                total = part if total is None else total + part
            assert total is not None  # there is at least one network
            _check_labels(batch, total.shape[1])
            votes.append(total.argmax(1))
    return torch.cat(votes)
