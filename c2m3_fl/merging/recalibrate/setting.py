"""The setting of a recalibration: an averaged network, its aligned endpoints and calibration batches, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from c2m3_fl.core.averaging import mean_from_first, mean_of_owners, normalise_weights
from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import order_by_weight, to_device
from c2m3_fl.errors import CalibrationError, ConfigError, ParamsError
from c2m3_fl.merging.recalibrate.targets import Target, View, as_it_is, forecasts, output_moments
from c2m3_fl.network.calibration import Batch, Calibration, ExampleInputs
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.moments import Moments
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.program import Program

_MEASURED = ("moments", "targets", "forecasts")  # cached properties of a setting


@dataclass(frozen=True)
class Setting:
    """Networks, calibration data and options of a recalibration, on one device.

    Attributes
    ----------
    programs : tuple of Program
        The traced network, one entry per batch.
    batches : tuple of Batch
        The calibration data.
    merged : mapping of str to Tensor
        The averaged state dict.
    endpoints : tuple of mappings of str to Tensor
        The averaged networks in canonical order, each aligned or with a view.
    weights : Tensor of float64, shape (endpoints,)
        Averaging weights in the same order; they sum to one.
    model : nn.Module
        The architecture.
    order : tuple of int
        Index of each endpoint in the order of the caller.
    views : tuple of View
        View of each endpoint's outputs in the basis of the average: `as_it_is`, unless a linear map of the endpoint
        was averaged, because the mapped network does not compute the endpoint's function.
    own : tuple of mappings of str to Moments
        Each endpoint's channel moments on its own training data, aligned; empty if they are not known, and for an
        endpoint of which they are not.
    plain : mapping of str to Tensor, optional
        The average without any alignment: one more candidate for a guard.
    left_out : tuple of Tensor of bool
        Per batch the inputs that no weights may be fitted to, because a guard will judge the fit on them; moments of
        channels may be measured on all inputs. Empty if no input is left out.
    sources : tuple of tuple of Program
        For endpoints of other widths than the average: per endpoint the exported network that it runs in, one entry
        per batch. Empty if all have the architecture of `programs`.
    owned : callable, optional
        For endpoints of other widths: whether each has the channels of an operator's output, bool of shape
        (endpoints, channels). A channel's mean is over the endpoints that have it. None: all have all.
    """

    programs: tuple[Program, ...]
    batches: tuple[Batch, ...]
    merged: Params
    endpoints: tuple[Params, ...]
    weights: Tensor
    model: nn.Module
    order: tuple[int, ...]
    views: tuple[View, ...]
    own: tuple[Mapping[str, Moments], ...] = ()
    plain: Params | None = None
    left_out: tuple[Tensor, ...] = ()
    sources: tuple[tuple[Program, ...], ...] = ()
    owned: Callable[[Operator], Tensor] | None = None

    def leaving_out(self, masks: Sequence[Tensor]) -> Setting:
        """The same setting, with inputs that no weights may be fitted to; measured moments are kept."""
        other = replace(self, left_out=tuple(masks))
        other.__dict__.update({name: self.__dict__[name] for name in _MEASURED if name in self.__dict__})
        return other

    def programs_of(self, endpoint: int) -> tuple[Program, ...]:
        """The exported network that an endpoint runs in, one entry per batch."""
        return self.sources[endpoint] if self.sources else self.programs

    def mean(self, operator: Operator, values: Sequence[Tensor]) -> Tensor:
        """Weighted mean of the endpoints' values of an operator's channels, which are the last axis of each value."""
        share = self.weights.tolist()
        if self.owned is None:
            return mean_from_first(values, share)
        return mean_of_owners(values, share, list(self.owned(operator)))

    @cached_property
    def moments(self) -> list[dict[str, Moments]]:
        """Each endpoint's channel moments on the calibration data; measured on first use, in one pass each."""
        with torch.no_grad():
            return [
                output_moments(self.programs_of(place), self.batches, endpoint, view)
                for place, (endpoint, view) in enumerate(zip(self.endpoints, self.views, strict=True))
            ]

    @cached_property
    def targets(self) -> dict[str, Target]:
        """Moments that every operator's output should have."""
        return {
            operator.name: Target(
                self.mean(operator, [moments[operator.name].mean for moments in self.moments]),
                self.mean(operator, [moments[operator.name].std for moments in self.moments]),
            )
            for operator in self.programs[0].operators
        }

    @cached_property
    def forecasts(self) -> dict[str, Moments]:
        """Moments that closed-form REPAIR expects of the averaged network.

        Raises
        ------
        ConfigError
            When the endpoints differ in width.
        """
        if self.sources:
            raise ConfigError("Repair(closed_form=True) takes endpoints of one width; use Repair() or Refit()")
        with torch.no_grad():
            return forecasts(self.programs, self.batches, self.endpoints, self.views, self.weights)

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.batches[0].inputs[0].device

    @property
    def inputs(self) -> int:
        """Number of calibration inputs."""
        return sum(len(batch.inputs[0]) for batch in self.batches)


def prepare(
    model: nn.Module,
    merged: Params,
    endpoints: Sequence[Params],
    calibration: Calibration | CalibrationSet,
    *,
    weights: Sequence[float] | Tensor | None = None,
    example_inputs: ExampleInputs | None = None,
    inputs: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    plain: Params | None = None,
    views: Sequence[View] | None = None,
    order: Sequence[int] | None = None,
) -> Setting:
    """Check all arguments, export the network, and bring everything to one device.

    Parameters
    ----------
    model : nn.Module
        The architecture; not mutated.
    merged : mapping of str to Tensor
        The averaged state dict.
    endpoints : sequence of mappings of str to Tensor
        The networks that were averaged, their units in the order of `merged`.
    calibration : iterable of batches, or CalibrationSet
        Inputs that every endpoint sees; a `CalibrationSet` is neither checked nor exported again.
    weights : sequence of float, optional
        The endpoints' averaging weights; equal by default.
    example_inputs : Tensor, tuple or dict, optional
        A tuple or dict says how many inputs the network takes; otherwise one.
    inputs : sequence of str, optional
        The keys of dict batches that are inputs: see `load_batches`.
    device : torch.device or str, optional
        Where to compute; by default where the merged parameters are.
    plain : mapping of str to Tensor, optional
        The average without any alignment: one more candidate for a guard.
    views : sequence of View, optional
        View of each endpoint's outputs in the basis of the average; by default `as_it_is`.
    order : sequence of int, optional
        The endpoints' canonical order, if the caller knows it; by default by weight and a digest of each.

    Raises
    ------
    CalibrationError, TraceError, WeightsError, ParamsError
        When the data, the network, the weights or the state dicts do not fit.
    """
    if not endpoints:
        raise ParamsError("endpoints: got none, expected the state dicts that were averaged")
    if views is not None and len(views) != len(endpoints):
        raise ParamsError(f"views: got {len(views)}, expected one for each of {len(endpoints)} endpoints")
    share = normalise_weights(weights, len(endpoints))
    for index, endpoint in enumerate(endpoints):
        check_params(model, endpoint, f"endpoint {index}")
        check_types(model.state_dict(), endpoint, f"endpoint {index}")
    for who, params in {"merged": merged, **({} if plain is None else {"plain": plain})}.items():
        check_params(model, params, who)
        check_types(model.state_dict(), params, who)
    place = torch.device(device) if device is not None else next(iter(merged.values())).device
    held = CalibrationSet.of(model, calibration, example_inputs=example_inputs, inputs=inputs).to(place)
    if not held.batches:
        raise CalibrationError("there are only example inputs, expected calibration batches: pass calibration")
    order = order_by_weight(endpoints, share) if order is None else order
    return Setting(
        programs=held.programs,
        batches=held.batches,
        merged=to_device(merged, place),
        endpoints=tuple(to_device(endpoints[index], place) for index in order),
        weights=share[order],
        model=model,
        order=tuple(order),
        views=(as_it_is,) * len(order) if views is None else tuple(views[index] for index in order),
        plain=None if plain is None else to_device(plain, place),
    )


def check_params(model: nn.Module, params: Params, who: str) -> None:
    """Raise `ParamsError` unless `params` is a finite state dict of `model`.

    Parameters
    ----------
    model : nn.Module
        The architecture.
    params : mapping of str to Tensor
        What is checked.
    who : str
        Its name in the error.
    """
    if isinstance(params, nn.Module):
        raise ParamsError(f"{who} is the module {type(params).__name__}, expected its state_dict()")
    if not isinstance(params, Mapping):
        raise ParamsError(
            f"{who} is a {type(params).__name__}, expected a state dict: tensors by name"
            + ("; nodes in a dict are passed as list(nodes.values())" if type(params).__name__ == "str" else "")
        )
    expected = model.state_dict()
    if not expected:
        raise ParamsError(f"{who}: {type(model).__name__} has no parameters and no buffers, so there is nothing to do")
    missing = [name for name in expected if name not in params]
    extra = [name for name in params if name not in expected]
    if missing or extra:
        raise ParamsError(
            f"{who}: keys differ from those of {type(model).__name__}: missing {missing[:5]}, unexpected {extra[:5]}"
        )
    for name, value in expected.items():
        if not isinstance(params[name], Tensor):
            raise ParamsError(f"{who}: {name!r} is a {type(params[name]).__name__}, expected a tensor")
        if params[name].shape != value.shape:
            raise ParamsError(f"{who}: {name!r} has shape {tuple(params[name].shape)}, expected {tuple(value.shape)}")
        if params[name].is_floating_point() != value.is_floating_point():
            raise ParamsError(f"{who}: {name!r} is of type {params[name].dtype}, expected {value.dtype}")
        if params[name].is_floating_point() and not bool(torch.isfinite(params[name]).all()):
            raise ParamsError(f"{who}: {name!r} holds NaN or infinite values")


def check_types(expected: Params, params: Params, who: str) -> None:
    """Raise `ParamsError` unless all floating-point tensors have the types of those in `expected`.

    Parameters
    ----------
    expected : mapping of str to Tensor
        A state dict of the right types.
    params : mapping of str to Tensor
        What is checked.
    who : str
        Its name in the error.
    """
    for name, value in expected.items():
        if value.is_floating_point() and params[name].dtype != value.dtype:
            raise ParamsError(
                f"{who}: {name!r} is of type {params[name].dtype}, expected {value.dtype}; "
                "bring the model and all state dicts to one type"
            )


def usable_device(device: torch.device | str) -> torch.device:
    """A device that can be computed on; raise `ConfigError` for any other."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found).cpu()  # fails on "meta", too, whose tensors have no values
    except Exception as error:
        raise ConfigError(f"device is {device!r}, which cannot be used here: {error}") from error
    return found
