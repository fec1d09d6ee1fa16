"""What users pass by mistake, named together with what to pass instead."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import wraps
from inspect import signature
from typing import ParamSpec

from flwr.server import strategy as legacy
from flwr.serverapp import strategy as current

from c2m3_fl.errors import ConfigError, ParamsError
from c2m3_fl.flower.records import bare_name

P = ParamSpec("P")

_NAMES = ("FedAvg", "FedAvgM", "FedAdam", "FedProx", "FedTrimmedAvg", "Krum", "QFedAvg")
CURRENT = [getattr(current, name) for name in _NAMES]
LEGACY = [getattr(legacy, name) for name in _NAMES]


def naming_options_of(inside: Sequence[type]) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorate the constructor of a wrapper: options of the strategies inside, and of `start`, raise `ConfigError`.

    Parameters
    ----------
    inside : sequence of type
        The strategies, the most likely one first.
    """

    def decorate(construct: Callable[P, None]) -> Callable[P, None]:
        own = signature(construct).parameters

        @wraps(construct)
        def checked(*args: P.args, **options: P.kwargs) -> None:
            for name in options.keys() - own.keys():
                for kind in inside:
                    if name in signature(kind).parameters:
                        raise ConfigError(
                            f"C2M3 has no option {name!r}, which belongs to the strategy inside: "
                            f"pass {kind.__name__}({name}=...) as strategy"
                        )
                    if name in signature(getattr(kind, "start", kind)).parameters:
                        raise ConfigError(
                            f"C2M3 has no option {name!r}, which belongs to its method start: pass start({name}=...)"
                        )
            construct(*args, **options)

        return checked

    return decorate


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
    if differing and found.keys() == known.keys():
        one, other = differing[0]
        raise ParamsError(
            f"{who}: {one!r} is {other!r} in the model that C2M3 was given; torch.compile and DataParallel put a "
            "prefix before every name: pass the state dict of the very object that is `model`, or both without it"
        )


def check_exchanged(names: Iterable[str]) -> list[str]:
    """The option `exchanged` as a list; `ConfigError` where it is one name, whose letters would be taken for names."""
    if isinstance(names, str):
        raise ConfigError(f"exchanged is the text {names!r}, expected names: exchanged=[{names!r}]")
    return list(names)


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
