"""The guard: of several networks keep the best by evidence, and say what the evidence was.

Known blind spots. Labels speak for the data they label: where calibration data come from elsewhere, so does their
verdict. The shift of channel moments does not see a change that leaves means and spreads of channels alone.
Agreement with the ensemble is measured on the calibration data, where it improves even while accuracy on the nodes'
own data falls; and where nodes saw few classes each, a refit network is better than their ensemble, which agreement
counts against it. So it is reported, and decides only where nothing better is known.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.merging.refit import Refit
from c2m3_fl.merging.repair import Repair
from c2m3_fl.merging.reports import Candidate, Decision, Recalibrated
from c2m3_fl.merging.setting import Setting
from c2m3_fl.merging.shift import shift
from c2m3_fl.models.program import Walk


@dataclass(frozen=True)
class Auto:
    """Do the strongest thing that can be shown to be safe, and report why.

    With labelled calibration data the plain average, REPAIR and refit compete on them. Without, refit is done where
    the calibration data are shown to be like the nodes' own (see `c2m3_fl.merging.shift`), REPAIR otherwise.

    Attributes
    ----------
    limit : float
        Largest shift, in standard deviations of a channel, at which refit is trusted. Set by hand from one seed of
        MNIST and CIFAR-10 clients, and checked on no other: about .04 for the nodes' own distribution, .35 and more
        where every node saw few classes. Up to about .7 (foreign images) refit gained on REPAIR, at about .9 (added
        noise) nothing; noise alone, beyond 1, cost 1.6 points on CIFAR-10 and gained 8 on MNIST.
    repair, refit : Repair, Refit
        The candidates.
    """

    limit: float = 0.8
    repair: Repair = field(default_factory=Repair)
    refit: Refit = field(default_factory=Refit)

    def __call__(self, setting: Setting) -> Recalibrated:
        """Recalibrate ``setting.merged``."""
        start = time.perf_counter()
        distance = shift(setting)
        labelled = all(batch.labels is not None for batch in setting.batches)
        done = {"repair": self.repair(setting)}
        trusted = distance is not None and distance <= self.limit
        if labelled or trusted:
            done["refit"] = self.refit(setting)
        candidates = {name: each.state_dict for name, each in done.items()}
        decision = judge(setting, {"none": setting.merged, **candidates} if labelled else candidates)
        if not labelled:
            decision = replace(decision, chosen=list(done)[-1], reason=self._reason(distance))
        decision = replace(decision, shift=distance)
        plain = Recalibrated(dict(setting.merged), replace(done["repair"].report, operators=()))
        kept = done.get(decision.chosen, plain)
        report = replace(kept.report, method=decision.chosen, decision=decision, seconds=time.perf_counter() - start)
        return Recalibrated(kept.state_dict, report)

    def _reason(self, distance: float | None) -> str:
        if distance is None:
            return (
                "nothing shows whether the calibration data are like the nodes' own, so refit was held back; "
                "give labels, or each node's channel_moments"
            )
        verdict = "like the nodes' own, within" if distance <= self.limit else "unlike the nodes' own, beyond"
        return f"the calibration data are {verdict} {self.limit:g} spreads of a channel: {distance:.2f}"


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
            votes.append(total.argmax(1))
    return torch.cat(votes)
