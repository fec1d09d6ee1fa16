"""What users pass by mistake, named together with what to pass instead."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence, Set
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import ParamSpec

from flwr.server import strategy as legacy
from flwr.serverapp import strategy as current

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import check_finite
from c2m3_fl.errors import ConfigError, ParamsError
from c2m3_fl.flower.incoming.records import bare_name
from c2m3_fl.flower.setup import Setup

P = ParamSpec("P")

_NAMES = ("FedAvg", "FedAvgM", "FedAdam", "FedProx", "FedTrimmedAvg", "Krum", "QFedAvg")
CURRENT = [getattr(current, name) for name in _NAMES]
LEGACY = [getattr(legacy, name) for name in _NAMES]
_DIALECTS = {  # options of FedAvg and of its start, legacy and current
    "fraction_fit": "fraction_train",
    "min_fit_clients": "min_train_nodes",
    "min_evaluate_clients": "min_evaluate_nodes",
    "min_available_clients": "min_available_nodes",
    "fit_metrics_aggregation_fn": "train_metrics_aggr_fn",
    "evaluate_metrics_aggregation_fn": "evaluate_metrics_aggr_fn",
    "initial_parameters": "initial_arrays",
    "on_fit_config_fn": "train_config",
    "on_evaluate_config_fn": "evaluate_config",
}
_OTHER = {**_DIALECTS, **{new: old for old, new in _DIALECTS.items()}}


def naming_options_of(inside: Sequence[type]) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorate the constructor of a wrapper: options that it does not have raise `ConfigError`, with what to pass.

    Parameters
    ----------
    inside : sequence of type
        The strategies that may be inside, the most likely one first.
    """

    def decorate(construct: Callable[P, None]) -> Callable[P, None]:
        own = signature(construct).parameters

        @wraps(construct)
        def checked(*args: P.args, **options: P.kwargs) -> None:
            for name in options:
                if name not in own:
                    raise ConfigError(f"C2M3 has no option {name!r}{_remedy(name, inside, own)}")
            construct(*args, **options)

        return checked

    return decorate


def _remedy(name: str, inside: Sequence[type], own: Iterable[str]) -> str:
    """Where an option belongs that a wrapper does not have; the nearest one that it has; or nothing."""
    for option in (name, _OTHER.get(name, name)):
        kind = next((each for each in inside if option in signature(each).parameters), None)
        if kind is not None:
            return f", which belongs to the strategy inside: pass {kind.__name__}({option}=...) as strategy"
        if option in signature(getattr(inside[0], "start", inside[0])).parameters:
            return f", which belongs to its method start: pass start({option}=...)"
    near = get_close_matches(name, list(own), n=1, cutoff=0.75)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_prefixes(given: Iterable[str], model: Iterable[str], who: str) -> None:
    """Raise `ParamsError` where names differ from the model's in what torch.compile or DataParallel puts before them.

    Parameters
    ----------
    given, model : iterable of str
        Names of the tensors, and of the model's.
    who : str
        Whose names they are, for the error message.
    """
    found, known = ({bare_name(name): name for name in names} for names in (given, model))
    differing = [(found[bare], name) for bare, name in known.items() if bare in found and found[bare] != name]
    if differing and found.keys() <= known.keys():
        one, other = differing[0]
        raise ParamsError(
            f"{who}: {one!r} is {other!r} in the model that C2M3 was given; torch.compile and DataParallel put a "
            "prefix before every name: pass the state dict of the very object that is `model`, or both without it"
        )


def check_exchanged(names: object, *, ordered: bool = False) -> list[str]:
    """The option `exchanged` as a list of names.

    Parameters
    ----------
    names : iterable of str
        The option.
    ordered : bool
        Whether the order counts.

    Raises
    ------
    ConfigError
        Where it is one name, whose letters would be taken for names, something else than names, or twice the same, or
        where it has no order.
    """
    if isinstance(names, str):
        raise ConfigError(f"exchanged is the text {names!r}, expected names: exchanged=[{names!r}]")
    if not isinstance(names, Iterable) or (ordered and isinstance(names, Set)):
        how = " in the order in which clients send them" if ordered else ""
        raise ConfigError(f"exchanged is a {type(names).__name__}, expected a list of names{how}")
    found: list[str] = []
    for name in names:
        if not isinstance(name, str) or name in found:
            raise ConfigError(f"exchanged holds {name!r}, expected names, every one of them once")
        found.append(name)
    return found


def check_start(given: Iterable[str], exchanged: Collection[str]) -> None:
    """Raise `ParamsError` where a run starts with all of the exchanged arrays and others.

    Parameters
    ----------
    given : iterable of str
        Names of the arrays that the run starts with.
    exchanged : collection of str
        The names that the option `exchanged` holds.
    """
    given = list(given)
    others = [name for name in given if name not in exchanged]
    if others and len(given) - len(others) == len(exchanged):
        raise ParamsError(
            f"the arrays to send out hold {others[:5]}, which exchanged= does not name: start the run with the "
            "exchanged arrays alone, ArrayRecord({name: model.state_dict()[name] for name in exchanged}), or name them"
        )


def check_fits(params: Params, setup: Setup, who: str) -> None:
    """Raise `ParamsError` where arrays to send out are not those of the model, or of the part that is exchanged.

    Parameters
    ----------
    params : mapping of str to Tensor
        What is to be sent out.
    setup : Setup
        Of the strategy.
    who : str
        Whose they are, for the error message.
    """
    model = setup.state_dict()
    missing = [name for name in model if name not in params]
    extra = [name for name in params if name not in model]
    if missing or extra:
        raise ParamsError(
            f"{who}: keys differ from the model's: missing {missing[:5]}, unexpected {extra[:5]}; start with "
            "ArrayRecord(model.state_dict()), or with some of its arrays if clients send no others"
        )
    for name, value in model.items():
        if params[name].shape != value.shape:
            raise ParamsError(f"{who}: {name!r} has shape {tuple(params[name].shape)}, expected {tuple(value.shape)}")
    trained = {name for name, _ in setup.model.named_parameters(remove_duplicate=False)}
    for name, value in params.items():
        if setup.names.get(name, name) not in trained and not bool(value.isfinite().all()):
            raise ParamsError(
                f"{who}: the buffer {name!r} holds NaN or infinities, as masks do, which cannot be averaged: register "
                "it with persistent=False, or exchange the other arrays alone, such as dict(model.named_parameters())"
            )
    check_finite(params, who)
