"""The guard: choose among several networks by evidence, and report the evidence.

Limits. Accuracy on labels holds for the distribution of the labelled data, which may differ from the nodes'. The shift
compares means and spreads of channels; other differences between distributions are not detected. Agreement with the
ensemble is measured on the calibration data, where it can rise while accuracy on the nodes' own data falls; and if
each node saw few classes, a refit network is better than the ensemble, so it agrees less. Agreement is therefore
reported, and decides only when there is no other evidence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError
from c2m3_fl.merging.recalibrate.held_out import held_out
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.refit_targets import FOLDS
from c2m3_fl.merging.recalibrate.repair import BatchNormStatistics, Repair, recalibration_report
from c2m3_fl.merging.recalibrate.setting import Setting
from c2m3_fl.merging.recalibrate.shift import shift
from c2m3_fl.merging.reports import Recalibrated, RecalibrationCandidate, RecalibrationDecision
from c2m3_fl.network.calibration import Batch
from c2m3_fl.network.program import Program, Walk

# About the geometric mean of two shifts on held-out training images of MNIST and CIFAR-10: the largest with data of the
# clients' own distribution, however skewed their labels (.25), and the smallest at which refit lost to REPAIR (.95).
LIMIT = 0.5
_LEAST = FOLDS + 1  # labelled inputs: with one left out, refit still has enough to hold one out for its strength


@dataclass(frozen=True)
class Auto:
    """Choose the strongest recalibration that the evidence supports, and report why.

    With labelled calibration data the candidates are compared by accuracy: the plain mean without any alignment (if
    the setting has it), the aligned mean, re-estimated BatchNorm statistics and REPAIR. Refit fits all weights to the
    inputs, so its accuracy on them is biased. One input in five is therefore left out of a trial fit; refit replaces
    the best of the others only if it is more accurate than that one on the inputs left out, and is then fitted to
    all. Without labels, refit is applied if the shift (see `recalibrate.shift`) is within the limit, and REPAIR if it
    is beyond it. If no shift is known, REPAIR is applied, unless a safer network agrees more with the ensemble of the
    endpoints.

    Attributes
    ----------
    limit : float
        Largest shift, in standard deviations of a channel, at which refit is applied; see `LIMIT`.
    repair, refit : Recalibration
        The candidates; `Repair()` and `Refit()` by default. A replacement for `refit` must not fit weights to the
        inputs in ``setting.left_out``.

    Examples
    --------
    >>> from c2m3_fl.merging.recalibrate.setting import prepare
    >>> model = torch.nn.Linear(4, 3)
    >>> good, bad = model.state_dict(), {name: -value for name, value in model.state_dict().items()}
    >>> inputs = torch.randn(50, 4)
    >>> done = Auto()(prepare(model, bad, [bad, good], [(inputs, model(inputs).argmax(1))], plain=good))
    >>> done.report.decision.chosen, done.report.decision.reason.split(";")[0]
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
        if labelled:
            decision = self._by_labels(setting, done)
        else:
            if distance is not None and distance <= self.limit:
                done["refit"] = self.refit(setting)
            candidates = {name: each.state_dict for name, each in done.items()}
            decision = self._without_labels(setting, candidates, distance)
        unread = next((batch.unread for batch in setting.batches if batch.unread), "")
        if unread:
            note = f"the element after the inputs, {unread}, is not class labels: expected one integer for each input"
            decision = replace(decision, reason=f"{decision.reason}; {note}")
        kept = done[decision.chosen]
        report = replace(
            kept.report,
            method=decision.chosen,
            decision=replace(decision, shift=distance),
            seconds=time.perf_counter() - start,
        )
        return Recalibrated(kept.state_dict, report)

    def _by_labels(self, setting: Setting, done: dict[str, Recalibrated]) -> RecalibrationDecision:
        """Decide with labels, as described above; refit is added to `done` if it is chosen."""
        best = judge(setting, {name: each.state_dict for name, each in done.items()})
        votes = _votes(setting, done[best.chosen].state_dict)
        if votes is None:  # no class scores: nothing to compare by
            done["refit"] = self.refit(setting)
            return judge(setting, {name: each.state_dict for name, each in done.items()})
        if setting.inputs < _LEAST:
            reason = f"{best.reason}; refit needs at least {_LEAST} labelled inputs to be compared"
            return replace(best, reason=reason)
        masks = held_out(setting.batches, FOLDS)
        trial = self.refit(setting.leaving_out(masks)).state_dict
        left = torch.cat(masks)
        labels = torch.cat([batch.labels for batch in setting.batches if batch.labels is not None])[left]
        found = _votes(setting, trial)
        assert found is not None  # its outputs have the form of those above
        kept, gained = (float((each[left] == labels).double().mean()) for each in (votes, found))
        (judged,) = judge(setting, {"refit": trial}).candidates
        best = replace(best, candidates=(*best.candidates, replace(judged, accuracy=gained)))
        compared = (
            f"of the {int(left.sum())} labelled calibration inputs that were left out of its fit correctly, "
            f"{best.chosen!r} {kept:.1%}"
        )
        if gained <= kept:
            return replace(best, reason=f"{best.reason}; refit classifies {gained:.1%} {compared}")
        done["refit"] = self.refit(setting)
        return replace(best, chosen="refit", reason=f"it classifies {gained:.1%} {compared}")

    def _without_labels(
        self, setting: Setting, candidates: Mapping[str, Params], distance: float | None
    ) -> RecalibrationDecision:
        """Decide without labels, as described above."""
        decision = judge(setting, candidates)
        if "refit" in candidates:
            return replace(decision, chosen="refit", reason=self._reason(distance))
        # on inputs of another distribution agreement is no evidence
        better = _safer(decision.candidates) if distance is None else None
        if better is None:
            return replace(decision, chosen="repair", reason=self._reason(distance))
        reason = f"REPAIR was held back: it agrees less with the ensemble of the endpoints than {better!r} does"
        return replace(decision, chosen=better, reason=f"{reason}; {self._reason(distance)}")

    def _reason(self, distance: float | None) -> str:
        if distance is None:
            return (
                "it is not known whether the calibration data are like the nodes' own, so refit was held back; "
                "give labels, or each node's channel_moments"
            )
        if distance <= self.limit:
            return f"the calibration data are like the nodes' own, within {self.limit:g} spreads: {distance:.2f}"
        return (
            f"the calibration data are unlike the nodes' own, beyond {self.limit:g} spreads of a channel: "
            f"{distance:.2f}; so refit was held back"
        )


def _as_they_are(setting: Setting) -> dict[str, Recalibrated]:
    """The candidates that are not recalibrated, the safest first."""
    found = {} if setting.plain is None else {"plain": setting.plain}
    return {
        name: Recalibrated(dict(params), recalibration_report(name, setting, (), time.perf_counter()))
        for name, params in {**found, "none": setting.merged}.items()
    }


def _safer(candidates: Sequence[RecalibrationCandidate]) -> str | None:
    """The safer candidate that agrees most with the ensemble, if it agrees more than the repaired network."""
    agreement = {each.name: each.agreement for each in candidates if each.agreement is not None}
    repaired = agreement.pop("repair", None)
    if repaired is None or not agreement:
        return None
    best = max(agreement, key=agreement.__getitem__)
    return best if agreement[best] > repaired else None


def judge(setting: Setting, candidates: Mapping[str, Params]) -> RecalibrationDecision:
    """The best of several networks: by labels if there are any, otherwise by agreement with the ensemble.

    Parameters
    ----------
    setting : Setting
        Calibration data and endpoints.
    candidates : mapping of str to Params
        State dicts by name, the safest first; a later one is chosen only if it is better than all before it,
        or, without labels, at least as good.
    """
    labels = [batch.labels for batch in setting.batches]
    ensemble = _votes(setting, None)
    found = []
    for name, params in candidates.items():
        votes = _votes(setting, params)
        agreement = None if ensemble is None or votes is None else float((votes == ensemble).double().mean())
        known = [each for each in labels if each is not None]
        accuracy = None
        if votes is not None and len(known) == len(labels) and sum(map(len, known)) == len(votes):
            accuracy = float((votes == torch.cat(known)).double().mean())
        found.append(RecalibrationCandidate(name, accuracy, agreement))
    return _decide(found)


def _decide(found: Sequence[RecalibrationCandidate]) -> RecalibrationDecision:
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
        reason = "the outputs are not class scores, so nothing was compared"
    return RecalibrationDecision(best.name, reason, None, tuple(found))


def _check_labels(batch: Batch, classes: int) -> None:
    labels = batch.labels
    if labels is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise CalibrationError(
            f"calibration batch {batch.index}: labels from {int(labels.min())} to {int(labels.max())}, expected class "
            f"indices from 0 to {classes - 1}: the network gives {classes} scores"
        )


def _votes(setting: Setting, params: Params | None) -> Tensor | None:
    """Class that a network predicts for every calibration input, or with None the ensemble of the endpoints.

    None if outputs are not class scores.
    """
    voters = [(setting.programs, params, 1.0)] if params is not None else _voters(setting)
    votes = []
    with torch.no_grad():
        for index, batch in enumerate(setting.batches):
            total: Tensor | None = None
            for programs, network, weight in voters:
                outputs = Walk(programs[index], network, batch).finish()
                scores = outputs[0] if isinstance(outputs, (tuple, list)) and len(outputs) == 1 else outputs
                if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] < 2:
                    return None
                part = weight * scores.double().softmax(1)
                total = part if total is None else total + part
            assert total is not None  # there is at least one network
            _check_labels(batch, total.shape[1])
            votes.append(total.argmax(1))
    return torch.cat(votes)


def _voters(setting: Setting) -> list[tuple[Sequence[Program], Params, float]]:
    """Programs, state dict and weight of every endpoint."""
    share = setting.weights.tolist()
    return [(setting.programs_of(place), each, share[place]) for place, each in enumerate(setting.endpoints)]
