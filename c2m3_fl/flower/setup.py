"""What a strategy is built from, checked once: model, symmetries, calibration data, options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from logging import DEBUG

import torch
from flwr.supercore import log
from torch import Tensor, nn

from c2m3_fl.core.spec import PermutationSpec, check_rotations
from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.flower.aligning.activation_start import DEEP, ActivationStart
from c2m3_fl.flower.aligning.aligner import Aligner
from c2m3_fl.flower.generators import undisturbed
from c2m3_fl.flower.judging.evidence import usable, with_usable_labels
from c2m3_fl.flower.judging.judge import ClientJudge
from c2m3_fl.flower.judging.judge_options import check_measured, check_moments, resolve_judge
from c2m3_fl.flower.options import Options, brief, resolve_device
from c2m3_fl.flower.privacy import Bounds
from c2m3_fl.flower.queries.head import Head, check_head, resolve_head
from c2m3_fl.flower.queries.refit import ClientRefit, RegMean
from c2m3_fl.flower.queries.repair import ClientStatistics, check_measurable
from c2m3_fl.flower.widths.sizes import Sizes, check_options
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.short_names import Recalibration, resolve_for
from c2m3_fl.network.calibration import Calibration, ExampleInputs
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.calls import Outputs
from c2m3_fl.network.copying import private_copy
from c2m3_fl.symmetry.discover import permutation_spec, require_invariance
from c2m3_fl.symmetry.folding import find_folding


@dataclass(frozen=True, eq=False)
class Setup:
    """What a strategy is built from; nothing here changes but the aligner's memory.

    Attributes
    ----------
    model : nn.Module
        The architecture.
    options : Options
        See `C2M3`.
    spec : PermutationSpec
        The symmetries of the network.
    aligner : Aligner
        Aligns the replies.
    device : torch.device
        Where to compute.
    data : CalibrationSet
        Example inputs, and the server's calibration batches where there are any.
    statistics : ClientStatistics, optional
        Where clients measure instead.
    moments : ClientStatistics, optional
        Where clients measure as well, for the guard.
    recalibration : Recalibration, optional
        What was asked for by name; None where evidence decides, or for nothing.
    decides : bool
        Whether evidence decides: `recalibrate` was left at None.
    refit : ClientRefit or RegMean, optional
        The refit that clients are asked for.
    head : Head, optional
        The last layer that clients are asked for.
    offered : bool
        Whether the head is a candidate that nobody asked for: it is deployed only where the clients judge so.
    judge : ClientJudge or CalibrationSet, optional
        Who judges the candidates: clients, or held-out labelled data.
    tentative : bool
        Whether clients judge because nothing else was asked for: then only where there is something to judge.
    names : mapping of str to str
        The model's names by those that clients send, where these differ.
    sizes : Sizes, optional
        The widths that clients may have, where these differ.
    """

    model: nn.Module
    options: Options
    spec: PermutationSpec
    aligner: Aligner
    device: torch.device
    data: CalibrationSet
    statistics: ClientStatistics | None = None
    moments: ClientStatistics | None = None
    recalibration: Recalibration | None = None
    decides: bool = True
    refit: ClientRefit | RegMean | None = None
    head: Head | None = None
    offered: bool = False
    judge: ClientJudge | CalibrationSet | None = None
    tentative: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    sizes: Sizes | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """The model's tensors that clients exchange, under the names that they send."""
        state = self.model.state_dict()
        return {name: state[self.names.get(name, name)] for name in self.spec.tensors}

    @property
    def bounds(self) -> Bounds:
        """What decides whether a bound on one client's change holds."""
        return {"separate": self.separate, "calibrated": self.calibrated, "rotating": bool(self.spec.rotations)}

    @property
    def calibrated(self) -> bool:
        """Whether aggregates may be recalibrated by the server's data or by clients' moments."""
        given = bool(self.data.batches) or self.statistics is not None
        return given and (self.decides or self.recalibration is not None)

    @property
    def asks(self) -> list[str]:
        """The options that ask clients about their data or deploy another model than the trajectory."""
        judge = None if self.tentative else self.judge
        head = None if self.offered else self.head
        found = {"recalibrate": self.refit, "head": head, "judge": judge, "moments": self.moments}
        return [name for name, value in found.items() if value is not None]

    @property
    def separate(self) -> bool:
        """Whether each reply is aligned by itself."""
        return self.options.alignment == "separate"

    def describe(self) -> str:
        """What recalibration is on, for the log."""
        server = "the clients' moments" if self.statistics else f"{self.data.inputs} inputs on the server"
        parts = []
        if self.calibrated:
            what = "as the evidence of each round allows" if self.decides else brief(self.recalibration)
            parts.append(f"{what}, with {server}")
        if self.refit is not None:
            parts.append(f"{brief(self.refit)}, from the clients' own data")
        if self.head is not None:
            asked = ", where clients answer for their labels" if self.offered else ""
            parts.append(f"{brief(self.head)}, the last layer from the clients' labels{asked}")
        if self.tentative and self.data.labelled and not self.asks and self.decides:
            parts.append("the inputs' labels decide")
        elif parts and isinstance(self.judge, ClientJudge):
            parts.append("the clients judge the candidates" + (", where they can" if self.tentative else ""))
        return "; ".join(parts) or "OFF"


def build_setup(
    model: nn.Module,
    options: Options,
    *,
    example_inputs: ExampleInputs | None = None,
    inputs: Sequence[str] | None = None,
    outputs: Outputs | None = None,
    calibration: Calibration | ClientStatistics | None = None,
    recalibrate: Recalibration | ClientRefit | RegMean | str | None = None,
    moments: ClientStatistics | None = None,
    spec: PermutationSpec | None = None,
    rotations: bool = False,
    head: Head | str | None = None,
    judge: ClientJudge | str | None = None,
    judge_key: str | None = None,
    device: torch.device | str | None = None,
    sizes: Iterable[nn.Module] | None = None,
) -> Setup:
    """Check everything that a user passed; see `C2M3` for the parameters.

    Raises
    ------
    ConfigError, CalibrationError, TraceError, SpecError
        For options that do not fit each other, unusable calibration data, a model that cannot be exported, or a
        spec that does not preserve its function.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is {f'the class {model.__name__}' if isinstance(model, type) else f'a {type(model).__name__}'}, "
            "expected a module such as Net()"
        )
    place = resolve_device(device)
    if sizes is not None:
        if rotations:
            raise ConfigError("rotations are for clients of one width, and sizes= has several: leave one of them out")
        asked = {"recalibrate": recalibrate, "calibration": calibration, "moments": moments, "spec": spec}
        head, judge = check_options(head, judge, judge_key, basis=options.basis, **asked)
        model = private_copy(model).cpu()  # later questions are of widths as they are now
    statistics = calibration if isinstance(calibration, ClientStatistics) else None
    if statistics is not None and example_inputs is None:
        raise CalibrationError(
            "calibration=ClientStatistics() shows the server no input: pass example_inputs, such as "
            "torch.zeros(1, 3, 32, 32), with which the network can be traced"
        )
    given = None if isinstance(calibration, ClientStatistics) else calibration
    with undisturbed(seed=0):  # a shuffling loader gives the same batches when the server is started again
        data = CalibrationSet.of(model, given, example_inputs=example_inputs, inputs=inputs, outputs=outputs).to("cpu")
    model = data.model  # where replies are
    refit, chosen = _resolve_recalibration(recalibrate, calibration)
    data = usable(data, asked=chosen is not None)
    data = data if chosen is not None or judge == "labels" else with_usable_labels(data)
    if spec is None:
        spec = permutation_spec(model, data.example_inputs, rotations=rotations)
    else:
        check_rotations(spec, rotations=rotations)
        require_invariance(model, spec, data.example_inputs)
    decides = recalibrate is None or refit is not None
    tentative = judge == "auto" and judge_key is None
    fitted, judging = resolve_judge(judge, judge_key, data)
    if tentative and not decides:
        judging = None  # a recalibration that was asked for by name is what is deployed
    check_moments(moments, fitted, chosen, decides=decides)
    if moments is not None or statistics is not None:
        check_measured(spec, data)
    last, offered = _resolve_last(head, data, offers=decides and isinstance(judging, ClientJudge), options=options)
    return Setup(
        model,
        options,
        spec,
        _aligner(model, spec, options, place, fitted, one_width=sizes is None),
        place,
        fitted,
        statistics,
        moments,
        chosen,
        decides,
        refit,
        last,
        offered,
        judging,
        tentative,
        sizes=Sizes.of(
            model,
            sizes,
            fitted,
            Refit() if decides else chosen,
            place,
            example_inputs=example_inputs,
            inputs=inputs,
            outputs=outputs,
        )
        if sizes is not None
        else None,
    )


def _resolve_recalibration(
    recalibrate: Recalibration | ClientRefit | RegMean | str | None,
    calibration: Calibration | ClientStatistics | None,
) -> tuple[ClientRefit | RegMean | None, Recalibration | None]:
    """The refit that clients are asked for, and the recalibration that `calibration` serves."""
    refit: ClientRefit | RegMean | None = None
    chosen: Recalibration | None = None
    if isinstance(recalibrate, ClientRefit | RegMean):
        refit = recalibrate
    else:
        chosen = resolve_for(recalibrate, data=calibration is not None, default="none")
    if isinstance(calibration, ClientStatistics):
        check_measurable(chosen)
    return refit, chosen


def _resolve_last(
    head: Head | str | None, data: CalibrationSet, *, offers: bool, options: Options
) -> tuple[Head | None, bool]:
    """The head that clients are asked for, and whether nobody asked for it by name.

    None is offered where labels on the server are the stronger evidence, and with separate alignment, under which no
    client's part in the model shall depend on another client: differential privacy needs it.
    """
    found, offered = resolve_head(head), head == "auto"
    if found is None or (offered and (not offers or data.labelled or options.alignment == "separate")):
        return None, False
    try:
        check_head(data.program, data.model.state_dict(), found)
    except Exception as error:  # of what nobody asked for; of networks that cannot be traced, with a spec by hand, too
        if not offered:
            raise
        log(DEBUG, "no head from labels: %s", error)
        return None, False
    return found, offered


def _aligner(
    model: nn.Module,
    spec: PermutationSpec,
    options: Options,
    device: torch.device,
    data: CalibrationSet,
    *,
    one_width: bool,
) -> Aligner:
    deep = one_width and bool(data.batches) and len(spec.groups) >= DEEP
    return Aligner(
        spec,
        mode=options.alignment,
        basis=options.basis,
        memory=options.memory,
        device=device,
        max_steps=options.max_steps,
        tolerance=options.tolerance,
        max_seconds=options.max_seconds,
        memory_limit=options.memory_limit,
        second_start=ActivationStart(spec, data) if deep else None,
        fold=find_folding(model, data.example_inputs).fold if spec.rotations else None,
    )
