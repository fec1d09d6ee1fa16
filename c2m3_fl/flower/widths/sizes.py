"""The widths that clients may have, and a model restricted to each of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from logging import ERROR

import torch
from flwr.supercore import log
from torch import Tensor, nn

from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.state_dicts import to_device
from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.aligning.out_of_memory import with_cpu_fallback
from c2m3_fl.flower.generators import undisturbed
from c2m3_fl.flower.incoming.records import Schema, bare_name, reply_schema, schema_of_params
from c2m3_fl.flower.queries.refit_options import RegMean
from c2m3_fl.flower.queries.repair import ClientStatistics
from c2m3_fl.flower.widths.padding import Padding, placed
from c2m3_fl.flower.wrapped import typed_like
from c2m3_fl.merging.merge_widths import cut
from c2m3_fl.merging.recalibrate.short_names import Recalibration
from c2m3_fl.merging.widths.injections import Injection, carry
from c2m3_fl.merging.widths.networks import Network, Widths
from c2m3_fl.merging.widths.select import chosen_units
from c2m3_fl.network.calibration import ExampleInputs
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.calls import Outputs
from c2m3_fl.network.copying import private_copy

Shapes = Sequence[tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Sizes:
    """The networks of all widths.

    Attributes
    ----------
    networks : tuple of Network
        The model, which is the widest, and those of the option `sizes`: copies on the CPU.
    recalibration : Recalibration, optional
        Of a deployed model that is restricted to a narrower width; None leaves it as it is.
    device : torch.device
        Where to recalibrate.
    """

    networks: tuple[Network, ...]
    recalibration: Recalibration | None
    device: torch.device

    @classmethod
    def of(
        cls,
        model: nn.Module,
        sizes: object,
        data: CalibrationSet,
        recalibration: Recalibration | None,
        device: torch.device,
        *,
        example_inputs: ExampleInputs | None,
        inputs: Sequence[str] | None,
        outputs: Outputs | None,
    ) -> Sizes:
        """Trace every width and check that they differ in width alone.

        Parameters
        ----------
        model : nn.Module
            The widest network, whose arrays are aggregated; on the CPU, and nobody else's.
        sizes : iterable of nn.Module
            The option of `C2M3`.
        data : CalibrationSet
            The server's.
        recalibration : Recalibration, optional
            Of a deployed model that is restricted, where the server holds calibration batches.
        device : torch.device
            Where to recalibrate.
        example_inputs, inputs, outputs
            See `C2M3`.

        Raises
        ------
        ConfigError
            For sizes that are no modules, wider than the model, or of the same shapes as another one.
        SpecError
            Where two networks differ in more than width.
        """
        found = list(sizes) if isinstance(sizes, Iterable) and not isinstance(sizes, nn.Module) else []
        if not found or not all(isinstance(each, nn.Module) for each in found):
            raise ConfigError(f"sizes is {sizes!r:.80}, expected narrower networks such as [Net(0.5), Net(0.25)]")
        names = ["model", *(f"sizes[{place}]" for place in range(len(found)))]
        known: dict[tuple[tuple[int, ...], ...], str] = {}
        for name, network in zip(names, [model, *found], strict=True):
            shapes = tuple(tuple(value.shape) for value in network.state_dict().values())
            if shapes in known:
                raise ConfigError(f"{name} has the shapes of {known[shapes]}: leave it out")
            known[shapes] = name
        widths = Widths.of(
            [model, *(private_copy(each).cpu() for each in found)],  # whoever passed them may move or train them
            None,
            data,
            example_inputs=example_inputs,
            inputs=inputs,
            outputs=outputs,
            names=names,
        )
        if widths.wide is not widths.nodes[0]:
            raise ConfigError(f"{widths.wide.name} is wider than model: pass the widest network as model")
        return cls(widths.nodes, recalibration if data.batches else None, device)

    @property
    def spec(self) -> PermutationSpec:
        """Symmetries of the model."""
        return self.networks[0].spec

    def schema(self, place: int, sent: Schema) -> Schema:
        """What replies of one width look like.

        Parameters
        ----------
        place : int
            Which width: 0 for the model's.
        sent : mapping of str to Entry
            What replies of the model's width look like: the order and the element types.
        """
        return reply_schema(schema_of_params(self.networks[place].held.model.state_dict()), sent)

    def place_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        """Which width has tensors of these names and shapes; None if none has."""
        return self._places.get(_look(shapes))

    @cached_property
    def _places(self) -> dict[frozenset[tuple[str, tuple[int, ...]]], int]:
        states = [network.held.model.state_dict() for network in self.networks]
        looks = [_look({name: tuple(value.shape) for name, value in state.items()}) for state in states]
        return {look: place for place, look in enumerate(looks)}


def _look(shapes: Mapping[str, tuple[int, ...]]) -> frozenset[tuple[str, tuple[int, ...]]]:
    """What tells networks of different widths apart, without the prefixes of wrappers."""
    return frozenset((bare_name(name), shape) for name, shape in shapes.items())


def check_options(
    head: object, judge: object, judge_key: object, *, basis: object, spec: object, **asking: object
) -> tuple[None, str | None]:
    """The options `head` and `judge` where clients differ in width: nobody asks them about the whole model.

    Parameters
    ----------
    head, judge, judge_key, basis, spec
        As a user gave them.
    **asking
        Options that may ask clients.

    Raises
    ------
    ConfigError
        For options that need clients of one width.
    """
    refused: dict[str, object] = {
        name: value for name, value in asking.items() if isinstance(value, RegMean | ClientStatistics)
    }
    refused |= {} if head in ("auto", None) else {"head": head}
    refused |= {} if judge in ("auto", "labels", None, "none") else {"judge": judge}
    refused |= {} if judge_key is None else {"judge_key": judge_key}
    for name, value in refused.items():
        raise ConfigError(
            f"{name} is {value!r}, which asks clients about the whole model, and with sizes= not all can run it: "
            f"leave {name} out"
        )
    if basis != "global":
        raise ConfigError(f"basis is {basis!r}, expected 'global' with sizes=: clients of one width have its units")
    if spec is not None:
        raise ConfigError("spec is of one width, and with sizes= every width needs its own: leave spec out")
    return None, "labels" if judge == "labels" else None


def check_no_adapters(sizes: Sizes | None, lora: str) -> None:
    """Raise `ConfigError` for products of adapters of several widths."""
    if sizes is not None and lora != "apart":
        raise ConfigError(f"lora is {lora!r}, expected 'apart' with sizes=: products are of adapters of one width")


def check_whole(sizes: Sizes | None, names: Collection[str], tensors: Collection[str]) -> None:
    """Raise `ConfigError` where clients of several widths exchange a part of the state dict.

    Parameters
    ----------
    sizes : Sizes, optional
        The widths, where they differ.
    names, tensors : collection of str
        What is exchanged, and what the model has.
    """
    if sizes is not None and set(names) != set(tensors):
        raise ConfigError(
            f"the clients exchange {len(names)} of the model's {len(tensors)} tensors, and with sizes= they must "
            "exchange all: start with ArrayRecord(model.state_dict())"
        )


class Cuts:
    """One model, restricted to every width.

    The units of a width are those whose loss a refit could repair least, the same for all of its clients.

    Parameters
    ----------
    sizes : Sizes
        The widths.
    params : mapping of str to Tensor
        State dict of the model; not mutated.
    recalibration : Recalibration, optional
        Of the restrictions; None leaves them as they are.
    known : mapping of int to Params, optional
        By width, restrictions that clients have refit: they stand in place of the others.
    """

    def __init__(
        self,
        sizes: Sizes,
        params: Params,
        recalibration: Recalibration | None,
        known: Mapping[int, Params] | None = None,
    ) -> None:
        self._sizes, self._given, self._recalibration = sizes, params, recalibration
        self._params = typed_like(sizes.networks[0].held.model.state_dict(), params)
        self._units: dict[int, Injection] = {}
        self._paddings: dict[int, Padding] = {}
        self._cuts: dict[int, Params] = {0: params}
        for place, found in (known or {}).items():
            self._cuts[place] = {name: found[name] for name in params}

    def units(self, place: int) -> Injection:
        """For every unit of a width the unit of the model that it is."""
        if place not in self._units:
            wide, narrow = self._sizes.networks[0], self._sizes.networks[place]
            self._units[place] = chosen_units(wide, narrow.spec, self._params)
        return self._units[place]

    def params(self, place: int) -> Params:
        """The model at a width: itself at its own; recalibrated at a narrower one, as it is if that fails."""
        if place not in self._cuts:
            try:
                with undisturbed():
                    found, _ = with_cpu_fallback(partial(self._cut, place), self._sizes.device, "recalibration")
            except Exception as error:  # if recalibration fails, keep the restriction
                text = "\t> the model at the width of %s is not recalibrated: %s: %s"
                log(ERROR, text, self._sizes.networks[place].name, type(error).__name__, error)
                found = carry(self._sizes.spec, self._sizes.networks[place].spec, self.units(place), self._params)
            self._cuts[place] = {name: found[name].cpu() for name in self._given}
        return self._cuts[place]

    def _cut(self, place: int, device: torch.device) -> Params:
        """The model at a narrower width, computed on a device."""
        wide, narrow = self._sizes.networks[0], self._sizes.networks[place]
        return cut(wide, narrow, to_device(self._params, device), self.units(place), self._recalibration)[0]

    def injection(self, place: int) -> dict[str, Tensor]:
        """For every unit of the model the unit of a width that it is, or -1."""
        return placed(self._sizes.spec, self.units(place))

    def padded(self, place: int, params: Params, missing: Params) -> dict[str, Tensor]:
        """A network of a width as one of the model's: entries that it lacks are zero, in buffers those of `missing`.

        Parameters
        ----------
        place : int
            Which width.
        params : mapping of str to Tensor
            Its state dict.
        missing : mapping of str to Tensor
            State dict of the model's width.
        """
        if place not in self._paddings:
            narrow, wide = self._sizes.networks[place].spec, self._sizes.spec
            self._paddings[place] = Padding(narrow, wide, self.injection(place))
        return self._paddings[place](params, missing)
