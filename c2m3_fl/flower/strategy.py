"""C2M3 as a Flower strategy: align the clients' neurons, then let any strategy aggregate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import nn

from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.flower.adapters import Lora
from c2m3_fl.flower.aligning.aligner import Basis, Mode
from c2m3_fl.flower.dialect import Dialect
from c2m3_fl.flower.judging.judge import ClientJudge
from c2m3_fl.flower.misuse import CURRENT, naming_options_of
from c2m3_fl.flower.options import Deploy, Feedback, Options
from c2m3_fl.flower.queries.head import Head
from c2m3_fl.flower.queries.refit import ClientRefit, RegMean
from c2m3_fl.flower.queries.repair import ClientStatistics
from c2m3_fl.flower.setup import build_setup
from c2m3_fl.flower.wrapped import chain, check_instance, warn_of_start
from c2m3_fl.merging.recalibrate.short_names import Recalibration
from c2m3_fl.network.calibration import Calibration, ExampleInputs
from c2m3_fl.network.calls import Outputs


class C2M3(Dialect):
    """Align the clients' neurons before another strategy aggregates them.

    Every reply is checked, permuted into the basis of the global model that was sent out, and handed to the wrapped
    strategy. Its aggregate is the *trajectory*, which clients train next. What is returned, evaluated and saved is the
    *deployed* model: the trajectory, recalibrated as far as the evidence allows. Where nothing moves, the floating
    tensors of the trajectory are, bit for bit, what the wrapped strategy returns for the same replies in the same
    order, whatever is recalibrated. A reply that cannot be used is dropped, counted and logged; with too few left,
    the previous global model stays.

    Parameters
    ----------
    strategy : Strategy, optional
        Aggregates the aligned replies; `FedAvg()` by default.
    model : nn.Module
        The architecture whose arrays are exchanged; not mutated.
    example_inputs : Tensor, tuple or dict, optional
        Inputs that the network can be traced with; by default the first calibration batch.
    inputs : sequence of str, optional
        Which keys of dict batches and dict example inputs are the network's inputs: ``("img",)``.
    outputs : str, int or sequence of them, optional
        The network's outputs that are read, by key, field or place: ``"logits"``; by default all of them.
    calibration : iterable of batches or ClientStatistics, optional
        Inputs that the server holds, with labels or without, read once; or `ClientStatistics()`, to let the clients
        measure channel moments on theirs. Inputs of another range or spread than the clients' are left out where
        BatchNorm's buffers or `moments` show it (used, with a warning, where a recalibration is named), and a warning
        names inputs that are less far away; without either nothing does, so scale them as in training.
    recalibrate : str, Recalibration, ClientRefit or RegMean, optional
        What the deployed model is made of. None (default): what the evidence supports, see `evidence.choose_means`:
        labels in the calibration data, else the clients' judgement, else their moments, else REPAIR after rounds in
        which units moved, else the aggregate. "none", "repair", or any other name or object that `merge`
        takes: that, in every round. `ClientRefit()`: what the clients' own data refit, besides.
    moments : ClientStatistics, optional
        With calibration data on the server: ask every client for the channel moments of its own reply on its own
        data, which show whether the server's data are like theirs.
    spec : PermutationSpec, optional
        The symmetries of the network, proven on the example inputs; by default they are derived. Replies are folded
        where it rotates.
    rotations : bool
        Whether the derived symmetries rotate groups that linear operators alone read (the residual streams of
        transformers, the insides of heads), as in `merge`. Default False: all groups permute.
    exchanged : iterable of str, optional
        The names of the tensors that clients send, where that is not the whole state dict: a head, all but the norms,
        `dict(model.named_parameters())`, PEFT's `get_peft_model_state_dict(model)`. By default those of the arrays that
        a run starts from. A group of units moves where all tensors that carry it are exchanged; nothing is
        recalibrated.
    lora : {"apart", "exact", "residual"}
        Whether A and B of adapters (``lora_A``, ``lora_B``) are averaged apart (default), or "exact": as the products
        that they add to the base, under strategies that average. "residual": so, and what the best product of one rank
        leaves out is added to the base, which must then be exchanged: clients that never receive it cannot use it.
    head : {"auto", "labels"} or Head, optional
        Fit the deployed model's last layer to the clients' labels. "auto" (default): as a candidate, with calibration
        data or without, where outputs are class scores and the clients answer (`answer_statistics`) and judge.
    judge : {"auto", "clients", "labels"} or ClientJudge, optional
        Who compares the candidates for deployment: the clients by their own evaluation, or held-out calibration
        labels on the server. "auto" (default): the clients, once in a deploying round, where there are candidates
        besides the aggregate and no recalibration was asked for by name. Where they cannot, and with None: nobody;
        the candidate in which every step was taken that the other evidence supports is deployed.
    judge_key : str, optional
        The metric by which clients judge; by default the one whose name contains "loss".
    sizes : iterable of nn.Module, optional
        Narrower networks of the same architecture, for clients that cannot carry `model`: each client is sent the model
        at its own width, trains it, and replies at that width. A client says which it has by `answer_width`, else by
        the shapes of its first reply. Of what asks clients (`head`, `judge`, `moments`, `recalibrate`), only
        `ClientRefit` is allowed; they then run `model` itself.
    device : torch.device or str, optional
        Where to match and repair; by default CUDA when there is one, else the CPU.
    alignment : {"joint", "separate"}
        "joint" (default) matches all replies with each other; "separate" matches each one with nothing but the
        model that was sent out, so that no client's permutation depends on another client.
    basis : {"global", "largest", "client"} or int
        "global" (default): every round ends in the basis of the model that was sent out. "client": the same, and
        every client is sent the model in the neuron order that it last replied in, so that state which it keeps
        still fits. "largest" or a node id: the basis of that reply; a wrapped strategy with state of its own
        (momenta) needs one of the others.
    min_replies : int
        With fewer valid replies than this (default 1), not counting outliers that are dropped, the previous
        global model stays.
    outliers : {"report", "drop"}
        Whether replies that do not fit the others are named only (default), or left out as well.
    memory : int
        How many nodes' permutations to remember between rounds (default 1000).
    max_steps : int
        Upper limit of the solver's steps before it polishes (default 100).
    tolerance : float
        Relative duality gap at which the solver stops (default 1e-4).
    max_seconds : float, optional
        When to end a round's match by the clock, at the best found so far (default None: never). A round that this
        ends cannot be reproduced, and the log says so.
    memory_limit : int, optional
        Bytes that a match may take beside the replies (default None: no limit; about one and a half models a reply).
        Beyond it replies are matched in batches, at .1 to 1.5 % less agreement.
    diagnostics : bool
        Whether the metrics, which Flower prints in every round, hold all numbers, the agreement of every tensor of
        every client among them. By default they hold the main ones; the others but these agreements go to the log at
        DEBUG.
    feedback : {"never", "moved", "always"}
        When clients train the deployed model next instead of the trajectory: after rounds in which many units "moved"
        (default; at most once per node), "never" or "always". A deployed model of more than twice the largest reply's
        norm ends it for the run.
    deploy : {"last", "every"} or int
        In which rounds clients are asked for the deployment (`ClientRefit`, head, judge): the "last" one (default),
        "every" one, or every n-th and the last. In the others the aggregate is returned, recalibrated by the server
        where the evidence allows it.

    Raises
    ------
    ConfigError
        For options out of range, and for wrappers for differential privacy whose bound would no longer hold.
    CalibrationError, TraceError, SpecError
        For unusable calibration data, a model that cannot be exported, or a spec that does not preserve its function.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> strategy = C2M3(FedAvg(fraction_evaluate=0.5), model=net, example_inputs=torch.zeros(1, 4))
    """

    @naming_options_of(CURRENT)
    def __init__(
        self,
        strategy: Strategy | None = None,
        *,
        model: nn.Module,
        example_inputs: ExampleInputs | None = None,
        inputs: Sequence[str] | None = None,
        outputs: Outputs | None = None,
        calibration: Calibration | ClientStatistics | None = None,
        recalibrate: Recalibration | ClientRefit | RegMean | str | None = None,
        moments: ClientStatistics | None = None,
        spec: PermutationSpec | None = None,
        rotations: bool = False,
        exchanged: Iterable[str] | None = None,
        lora: Lora = "apart",
        head: Head | str | None = "auto",
        judge: ClientJudge | str | None = "auto",
        judge_key: str | None = None,
        device: torch.device | str | None = None,
        alignment: Mode = "joint",
        basis: Basis = "global",
        min_replies: int = 1,
        outliers: Literal["report", "drop"] = "report",
        memory: int = 1000,
        max_steps: int = 100,
        tolerance: float = 1e-4,
        max_seconds: float | None = None,
        memory_limit: int | None = None,
        diagnostics: bool = False,
        feedback: Feedback = "moved",
        deploy: Deploy = "last",
        sizes: Iterable[nn.Module] | None = None,
    ) -> None:
        inside = FedAvg() if strategy is None else strategy
        check_instance(inside, Strategy, C2M3)
        warn_of_start(chain(inside))
        options = Options(
            alignment=alignment,
            basis=basis,
            min_replies=min_replies,
            outliers=outliers,
            memory=memory,
            max_steps=max_steps,
            tolerance=tolerance,
            max_seconds=max_seconds,
            memory_limit=memory_limit,
            diagnostics=diagnostics,
            feedback=feedback,
            deploy=deploy,
        )
        setup = build_setup(
            model,
            options,
            example_inputs=example_inputs,
            inputs=inputs,
            outputs=outputs,
            calibration=calibration,
            recalibrate=recalibrate,
            moments=moments,
            spec=spec,
            rotations=rotations,
            head=head,
            judge=judge,
            judge_key=judge_key,
            device=device,
            sizes=sizes,
        )
        super().__init__(inside, setup, exchanged, lora)
