"""Reports of merges and recalibrations: how the nodes agree, and per operator what was corrected or could not be."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

_LAYERS = 8  # tensors in a summary, those whose nodes agree least


@dataclass(frozen=True)
class FitReport:
    """Quality of an operator's fit.

    Attributes
    ----------
    strength : float
        Ridge strength relative to the mean variance of the inputs; infinite if the weights were kept.
    error_before, error : float
        Held-out squared error, relative to the targets' variance, with the weights kept and with the fit.
    """

    strength: float
    error_before: float
    error: float


@dataclass(frozen=True)
class OperatorReport:
    """What recalibration did to one operator.

    Attributes
    ----------
    operator, module : str
        Name of the call in the traced graph, and path of the module that makes it.
    action : str
        What was done: "mean and spread", "spread only: no bias", "running statistics", "refit", …
    offset : float
        Before the correction: root mean square over channels of (mean - target) / target spread.
    spread : float
        Before the correction: median over channels of spread / target spread; below one if averaging shrank it.
    dead : int
        Channels that did not vary and kept their scale.
    fit : FitReport, optional
        Quality of the fit, if the operator was fitted.
    """

    operator: str
    module: str
    action: str
    offset: float
    spread: float
    dead: int = 0
    fit: FitReport | None = None


@dataclass(frozen=True)
class RecalibrationCandidate:
    """One of the networks that a guard, such as `Auto`, chose from.

    Attributes
    ----------
    name : str
        Short name.
    accuracy : float, optional
        Share of the labelled calibration inputs that it classifies correctly (for refit, of those that were left out
        of its fit); None without labels.
    agreement : float, optional
        Share of calibration inputs that it classifies as the ensemble of the endpoints does; None for networks
        whose output is not one tensor of scores.
    """

    name: str
    accuracy: float | None
    agreement: float | None


@dataclass(frozen=True)
class RecalibrationDecision:
    """Which recalibration a guard, such as `Auto`, chose by accuracy or agreement on the calibration data.

    Which network a federation deploys is another question, answered by paired losses on held-out data: see
    `merging.evaluate.decide.DeploymentDecision`.

    Attributes
    ----------
    chosen : str
        Short name of the candidate.
    reason : str
        Reason for the choice.
    shift : float, optional
        Distance of the calibration data from the nodes' own, if it is known.
    candidates : tuple of RecalibrationCandidate
        The networks that were compared, the safest first.
    """

    chosen: str
    reason: str
    shift: float | None
    candidates: tuple[RecalibrationCandidate, ...]


@dataclass(frozen=True)
class ScoreQuality:
    """Quality of a layer's class scores on held-out examples.

    Attributes
    ----------
    accuracy : float
        Share of the examples that are classified correctly.
    nll, ece : float
        Mean negative log-likelihood, and expected calibration error, of the unchanged scores.
    temperature : float
        The temperature of the grid at which the negative log-likelihood is least.
    nll_tempered, ece_tempered : float
        The same with the scores divided by it.
    """

    accuracy: float
    nll: float
    ece: float
    temperature: float
    nll_tempered: float
    ece_tempered: float


@dataclass(frozen=True)
class HeadReport:
    """A last layer that was fitted to labels.

    Attributes
    ----------
    before, after : ScoreQuality
        Scores of the previous layer, and of a layer fitted without the held-out examples, on these examples.
    clients : int
        Number of clients whose sums it was fitted to; 0 for data on the server.
    examples : float
        Number of labelled examples.
    dropped : tuple of (int, str)
        Nodes whose answers were left out, each with the reason.
    """

    before: ScoreQuality
    after: ScoreQuality
    clients: int
    examples: float
    dropped: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class RecalibrationReport:
    """What recalibration did.

    Attributes
    ----------
    method : str
        Short name of what was done.
    operators : tuple of OperatorReport
        In forward order.
    skipped : tuple of (str, str)
        Parameters that belong to no operator whose channels can be rescaled, each with the reason.
    inputs : int
        Number of calibration inputs.
    seconds : float
        Wall-clock time.
    decision : RecalibrationDecision, optional
        The decision of a guard, if there was one.
    head : HeadReport, optional
        How the last layer was fitted to labels, if it was.
    nodes : tuple of int
        The nodes whose answers were of use in a refit and that answered to the end, where clients were asked.
    """

    method: str
    operators: tuple[OperatorReport, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    inputs: int = 0
    seconds: float = 0.0
    decision: RecalibrationDecision | None = None
    head: HeadReport | None = None
    nodes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recalibrated:
    """A recalibrated state dict and its report."""

    state_dict: dict[str, Tensor]
    report: RecalibrationReport


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes
    ----------
    nodes : int
        Number of merged networks.
    basis : int
        Index of the node whose order of units the result has.
    weights : tuple of float
        Averaging weights, in the order of the nodes; they sum to one.
    objectives : (float, float), optional
        Weighted agreement of all pairs of nodes, before and after the match; None for methods that do not match.
    share_moved : tuple of float, optional
        Per node the share of its units that move on the way into the basis; None for maps that are not permutations.
    layers : mapping of str to tuple of float
        Per matched tensor each node's cosine with the weighted sum of the other nodes, after the match.
    recalibration : RecalibrationReport, optional
        What was recalibrated, what could not be, and why.
    notes : tuple of str
        Notes on the result, for the user.
    match_seconds, seconds : float
        Wall-clock time of the match, and of everything.
    """

    nodes: int
    basis: int
    weights: tuple[float, ...]
    objectives: tuple[float, float] | None
    share_moved: tuple[float, ...] | None
    layers: dict[str, tuple[float, ...]]
    recalibration: RecalibrationReport | None
    notes: tuple[str, ...]
    match_seconds: float
    seconds: float

    def __str__(self) -> str:
        facts = self.facts()
        width = max(len(name) for name, _ in facts) + 2
        return "\n".join(f"{name:<{width}}{text}" for name, text in facts)

    def facts(self) -> list[tuple[str, str]]:
        """The main results, as names and texts; of the tensors only those whose nodes agree least."""
        facts = [("networks", f"{self.nodes}, in the basis of number {self.basis}")]
        if self.objectives is not None:
            facts.append(("agreement", f"{self.objectives[0]:.6g} before, {self.objectives[1]:.6g} after"))
        if self.share_moved is not None:
            facts.append(("units moved", ", ".join(f"{share:.0%}" for share in self.share_moved)))
        angles = {name: cosines for name, cosines in self.layers.items() if any(cosines)}  # all zero: no directions
        worst = sorted(angles.items(), key=lambda item: min(item[1]))[:_LAYERS]
        if worst:
            which = f"the {len(worst)} of {len(self.layers)} tensors in which they agree least"
            facts.append(("cosines", f"of every network with the others, in {which}:"))
        facts += [(f"cosine {name}", ", ".join(f"{cosine:.2f}" for cosine in cosines)) for name, cosines in worst]
        done = self.recalibration
        on = "" if done is None or not done.inputs else f", on {done.inputs} inputs"
        facts.append(("recalibration", "none" if done is None else done.method + on))
        if done is not None and done.decision is not None:
            facts.append(("because", done.decision.reason))
        facts += [("note", note) for note in self.notes]
        facts.append(("seconds", f"{self.seconds:.1f}, of which matching {self.match_seconds:.1f}"))
        return facts
