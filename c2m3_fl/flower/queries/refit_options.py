"""What a refit from clients may be told, and what it costs a client."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.queries.sums import LARGEST_SKETCH, SPARSEST
from c2m3_fl.merging.recalibrate.from_clients.plan import Plan, Question, Role, norm_behind, plan_gram, plan_refit
from c2m3_fl.network.program import Program
from c2m3_fl.ranges import check_all_positive, check_flag, check_number, check_positive, check_whole


@dataclass(frozen=True, kw_only=True)
class SumsQuery:
    """What clients are asked for.

    Attributes
    ----------
    positions : int
        Largest number of rows, over all of a client's data, that an operator's sums are of.
    double : bool
        Whether clients answer in float64, in twice the bytes.
    max_bytes : int
        Limit of one client's sums over all exchanges. The largest operators are left out until the rest stays below
        it; the report names them. A `ClientRefit` asks for sketches first.
    first_layer : bool
        Whether to ask for the second moments of the network's input; clients must agree as well.
    timeout : float
        Seconds to wait for the answers; clients that do not answer in time are left out.
    seed : int
        Decides which positions are drawn.
    """

    positions: int = 4096
    double: bool = False
    max_bytes: int = 64_000_000
    first_layer: bool = False
    timeout: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("positions", 32), ("max_bytes", 0), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        for name in ("double", "first_layer"):
            check_flag(name, getattr(self, name))
        check_positive("timeout", self.timeout)


@dataclass(frozen=True, kw_only=True)
class ClientRefit(SumsQuery):
    """Fit every linear operator to what the clients' own networks give on their own data; pass it as `recalibrate`.

    Every network is asked only about data that it knows, so that clients may differ in their labels. Every client needs
    one line, `answer_statistics`. Norms other than BatchNorm, transposed convolutions and operators that are not
    fitted have their channel moments repaired, to those of the mixture of all own networks on their own data.

    Where clients differ in width (`C2M3(sizes=...)`), they run networks of the full width, their own padded with dead
    units. Every channel is fitted to the networks that have it; then the model's restriction to every narrower width
    is refit, in as many exchanges again. Norms over units (LayerNorm, GroupNorm) are refused then.

    Attributes
    ----------
    exchanges : int, optional
        Largest number of exchanges; by default one per operator. With fewer, several consecutive operators are
        measured under one network: a later one then does not see the corrections of the earlier ones, and the result
        may be below the average (measured on the page of this package).
    strengths : tuple of float
        Ridge strengths, relative to the mean variance of an operator's inputs, from which held-out examples choose;
        keeping the weights is always a candidate.
    holdout : int
        Every client holds out one example in so many.
    sketch : int
        Rows of the random sketches by which clients answer about operators whose sums would exceed `max_bytes`, the
        largest first: Gaussian mixtures of all rows, whose second moments are on average the sums. 0 leaves these
        operators out instead. Digits, five clients with two classes each, layers of 256 units: 32 rows give .93,
        exact sums .96, leaving two of three layers out .71.
    positions, double, max_bytes, first_layer, timeout, seed
        See `SumsQuery`.

    Raises
    ------
    ConfigError
        For values out of range.
    """

    exchanges: int | None = None
    strengths: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    holdout: int = 5
    sketch: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exchanges is not None:
            check_whole("exchanges", self.exchanges, 1)
        check_all_positive("strengths", self.strengths)
        check_whole("holdout", self.holdout, 2)
        check_whole("sketch", self.sketch, 0, LARGEST_SKETCH)
        if self.holdout > SPARSEST:
            raise ConfigError(
                f"holdout is {self.holdout}, expected at most {SPARSEST}: clients refuse to hold out less"
            )


@dataclass(frozen=True, kw_only=True)
class RegMean(SumsQuery):
    """Average every linear operator by the second moments of its inputs, each network's on its own data.

    One exchange; a client is sent its own aligned network alone. Weaker than `ClientRefit`. From data on the server
    there is no such form: `Refit` fits the merged network to them with the inputs that it has itself.

    Attributes
    ----------
    shrink : float
        Factor of the second moments of different inputs, from 0 to 1.
    positions, double, max_bytes, first_layer, timeout, seed
        See `SumsQuery`.
    """

    shrink: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("shrink", self.shrink, 0, 1)


@dataclass(frozen=True)
class Price:
    """What a refit costs one client.

    Attributes
    ----------
    exchanges : int
        Number of queries.
    sent : int
        Largest number of bytes of networks that it is sent, over all exchanges: whole ones in the first, what was
        corrected since in the others. A client that lost them, or missed an exchange, is sent them whole again.
    answered : int
        Bytes of its answers, over all exchanges.
    sketched : tuple of str
        Names of the operators that clients answer about by sketches, to stay below `max_bytes`.
    too_large : tuple of str
        Names of the operators that exceed `max_bytes` and are not fitted.
    kept_back : tuple of str
        Names of the operators that read the network's input and are not fitted without `first_layer`.
    """

    exchanges: int
    sent: int
    answered: int
    sketched: tuple[str, ...]
    too_large: tuple[str, ...]
    kept_back: tuple[str, ...]


def asks_clients(recalibration: object) -> bool:
    """Whether a recalibration is one of those that ask clients for sums, and so need a grid."""
    return isinstance(recalibration, SumsQuery)


def price(options: ClientRefit | RegMean, program: Program, params: Params) -> Price:
    """What a refit costs one client, from the shapes of the network.

    Parameters
    ----------
    options : ClientRefit or RegMean
        What is asked.
    program : Program
        The traced network.
    params : mapping of str to Tensor
        A state dict of it, for the shapes.
    """
    plan = plan_of(options, program, params)
    networks = 2 if isinstance(options, ClientRefit) else 1
    corrected = [_changes(program, step) for exchange in plan.exchanges[:-1] for step in exchange]
    sent = networks * _size(params, params) if plan.exchanges else 0
    sent += sum(_size(params, names) for names in corrected)
    return Price(len(plan.exchanges), sent, plan.size, plan.sketched, plan.too_large, plan.kept_back)


def _changes(program: Program, step: Question) -> set[str]:
    """Names of the tensors that the correction of an operator may change."""
    operator = program.operators[step.place]
    norm = norm_behind(program, operator) if step.role is Role.FIT else None
    touched = [name for each in (operator, norm) if each for name in (each.weight, each.bias, each.mean, each.variance)]
    return {alias for name in touched if name for alias in program.all_names(name)}


def _size(params: Params, names: Iterable[str]) -> int:
    return sum(params[name].numel() * params[name].element_size() for name in names)


def plan_of(options: ClientRefit | RegMean, program: Program, params: Params) -> Plan:
    """Which operators clients are asked about, and in which exchange."""
    width = 8 if options.double else 4
    if isinstance(options, RegMean):
        return plan_gram(program, params, width=width, max_bytes=options.max_bytes, first_layer=options.first_layer)
    return plan_refit(
        program,
        params,
        exchanges=options.exchanges,
        width=width,
        max_bytes=options.max_bytes,
        first_layer=options.first_layer,
        sketch=options.sketch,
    )
