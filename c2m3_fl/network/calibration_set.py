"""Calibration data, checked once, and the network, exported once for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from c2m3_fl.errors import CalibrationError
from c2m3_fl.network.calibration import Batch, Calibration, ExampleInputs, as_batch, as_inputs, load_batches
from c2m3_fl.network.calls import Outputs, as_called, choose_outputs
from c2m3_fl.network.program import Program, check_batches, export_batches, export_program


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """A network, its example inputs and its calibration batches, checked, with the programs exported for them.

    Attributes
    ----------
    model : nn.Module
        The architecture, with the example inputs that are not tensors and the choice of outputs built in.
    example_inputs : Tensor, tuple or dict
        The arguments of one call: as given, or the inputs of the first batch.
    batches : tuple of Batch
        The calibration data; empty if only example inputs were given.
    """

    model: nn.Module
    example_inputs: ExampleInputs
    batches: tuple[Batch, ...] = ()
    _moved: dict[torch.device, CalibrationSet] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        calibration: Calibration | CalibrationSet | None = None,
        *,
        example_inputs: ExampleInputs | None = None,
        inputs: Sequence[str] | None = None,
        outputs: Outputs | None = None,
    ) -> CalibrationSet:
        """Read the calibration data once and run the network on them.

        Parameters
        ----------
        model : nn.Module
            The architecture; not mutated.
        calibration : iterable of batches, or CalibrationSet, optional
            See `load_batches`. A `CalibrationSet` is returned as it is.
        example_inputs : Tensor, tuple or dict, optional
            The arguments of one call; by default the inputs of the first batch.
        inputs : sequence of str, optional
            The keys of dict batches and dict example inputs that are inputs: see `load_batches`.
        outputs : str, int or sequence of them, optional
            The network's outputs that are read: see `as_called`.

        Raises
        ------
        CalibrationError
            When there are neither data nor example inputs, a batch is malformed, or the network cannot take it.
        """
        if isinstance(calibration, CalibrationSet):
            return calibration
        model = choose_outputs(model, outputs)
        if isinstance(example_inputs, Mapping) and inputs is None:
            model, example_inputs = _with_constants(model, example_inputs)
        if calibration is None:
            if example_inputs is None:
                raise CalibrationError(
                    "neither example_inputs nor calibration were given; pass one of them, to show the inputs' shapes"
                )
            return cls(model, _chosen(model, example_inputs, inputs))
        batches = load_batches(calibration, model=model, example_inputs=example_inputs, inputs=inputs)
        check_batches(model, batches)
        shown = batches[0].example if example_inputs is None else _chosen(model, example_inputs, inputs)
        return cls(model, shown, batches)

    @property
    def example(self) -> Batch:
        """The example inputs as a batch."""
        return as_batch(self.example_inputs)

    @cached_property
    def program(self) -> Program:
        """The network, exported for the example inputs."""
        example = self.example
        alike = (index for index, batch in enumerate(self.batches) if batch.kind == example.kind)
        place = next(alike, None) if "programs" in self.__dict__ else None
        return export_program(self.model, example) if place is None else self.programs[place]

    @cached_property
    def programs(self) -> tuple[Program, ...]:
        """The network, exported once for every kind of batch; one entry per batch."""
        return tuple(export_batches(self.model, self.batches, checked=True)) if self.batches else ()

    @property
    def device(self) -> torch.device:
        """Where the batches are."""
        return (self.batches or (self.example,))[0].inputs[0].device

    @property
    def inputs(self) -> int:
        """Number of calibration inputs."""
        return sum(len(batch.inputs[0]) for batch in self.batches)

    @property
    def labelled(self) -> bool:
        """Whether there are batches and all of them carry labels."""
        return bool(self.batches) and all(batch.labels is not None for batch in self.batches)

    def to(self, device: torch.device | str) -> CalibrationSet:
        """The same data on another device; copied once per device."""
        place = torch.empty(0, device=device).device
        if place == self.device:
            return self
        if place not in self._moved:
            self._moved[place] = replace(
                self,
                example_inputs=_moved(self.example_inputs, place),
                batches=tuple(batch.to(place) for batch in self.batches),
            )
        return self._moved[place]


def _with_constants(model: nn.Module, example_inputs: Mapping[str, Any]) -> tuple[nn.Module, Mapping[str, Any]]:
    """A network that is called with the example inputs that are not tensors, and those that are."""
    constants = {name: value for name, value in example_inputs.items() if not isinstance(value, Tensor)}
    tensors = {name: value for name, value in example_inputs.items() if name not in constants}
    return (as_called(model, constants=constants) if constants else model), tensors


def _chosen(model: nn.Module, example_inputs: ExampleInputs, inputs: Sequence[str] | None) -> ExampleInputs:
    """Example inputs of the network; only the chosen keys of a dict."""
    if isinstance(example_inputs, Mapping) and inputs is not None:
        return load_batches([example_inputs], model=model, inputs=inputs)[0].example
    args, kwargs = as_inputs(example_inputs)
    return kwargs or args


def _moved(example_inputs: ExampleInputs, device: torch.device) -> ExampleInputs:
    args, kwargs = as_inputs(example_inputs)
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    return there or tuple(value.to(device) if isinstance(value, Tensor) else value for value in args)
