"""The networks of a merge of different widths: traced, proven alike, and one of them chosen as the widest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.errors import ConfigError, SpecError
from c2m3_fl.merging.widths.agree import check_alike, check_constants, fits_into, sizes, widest
from c2m3_fl.merging.widths.endpoints import check_programs
from c2m3_fl.network.calibration import Calibration, ExampleInputs
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.calls import Outputs
from c2m3_fl.network.program import Program, check_batches
from c2m3_fl.symmetry.discover import permutation_spec


@dataclass(frozen=True, eq=False)
class Network:
    """One width of the architecture.

    Attributes
    ----------
    name : str
        Name in errors: "models[1]".
    held : CalibrationSet
        The network with its example inputs and calibration batches.
    spec : PermutationSpec
        Its symmetries.
    """

    name: str
    held: CalibrationSet
    spec: PermutationSpec

    @property
    def programs(self) -> tuple[Program, ...]:
        """The exported network: one program per batch, or one for the example inputs."""
        return self.held.programs or (self.held.program,)


@dataclass(frozen=True, eq=False)
class Widths:
    """All networks of a merge.

    Attributes
    ----------
    nodes : tuple of Network
        One per node; nodes that share a module share their network.
    wide : Network
        The one in which the nodes are averaged: it has room for all of them.
    result : Network
        The one whose width the result has.
    node : int, optional
        The node whose units the result has, in its order, if a node was asked for.
    """

    nodes: tuple[Network, ...]
    wide: Network
    result: Network
    node: int | None

    @classmethod
    def of(
        cls,
        models: Sequence[nn.Module],
        width: nn.Module | int | None,
        calibration: Calibration | CalibrationSet | None,
        *,
        example_inputs: ExampleInputs | None,
        inputs: Sequence[str] | None,
        outputs: Outputs | None,
        names: Sequence[str] | None = None,
    ) -> Widths:
        """Trace every distinct module once and check that they differ in width alone.

        Parameters
        ----------
        models : sequence of nn.Module
            One per node.
        width : nn.Module or int, optional
            The network whose width the result has, or a number in `models`; by default the widest.
        calibration, example_inputs, inputs, outputs
            See `merge`.
        names : sequence of str, optional
            Names of the networks in errors; by default "models[0]" and so on.

        Raises
        ------
        SpecError
            When two networks differ in more than width, or none has room for all others.
        """
        first = CalibrationSet.of(models[0], calibration, example_inputs=example_inputs, inputs=inputs, outputs=outputs)
        shown = first.example_inputs if example_inputs is None else example_inputs
        known: dict[int, Network] = {}

        def network(model: nn.Module, name: str) -> Network:
            if id(model) not in known:
                held = CalibrationSet.of(model, example_inputs=shown, inputs=inputs, outputs=outputs)
                if first.batches:
                    check_batches(held.model, first.batches)
                held = replace(held, batches=first.batches)
                known[id(model)] = Network(name, held, permutation_spec(held.model, held.example_inputs))
            return known[id(model)]

        names = [f"models[{place}]" for place in range(len(models))] if names is None else names
        nodes = tuple(network(model, name) for model, name in zip(models, names, strict=True))
        result = None
        if width is not None:
            result = network(width, "width") if isinstance(width, nn.Module) else nodes[width]
        distinct = list(known.values())
        specs, titles = [each.spec for each in distinct], [each.name for each in distinct]
        check_alike(specs, titles)
        check_constants([each.held.model for each in distinct], specs, titles)
        place = widest(specs)
        if place is None:
            raise SpecError(_none_is_widest(distinct))
        wide = distinct[place]
        for each in distinct:
            check_programs(wide.programs[0], each.programs[0], (wide.name, each.name))
        return cls(nodes, wide, result or wide, width if isinstance(width, int) else None)

    @property
    def cuts(self) -> bool:
        """Whether the result has fewer units than the average."""
        return not fits_into(self.wide.spec, self.result.spec)


def check_models(
    model: nn.Module | None,
    models: object,
    state_dicts: Sequence[Params],
    width: object,
) -> list[nn.Module]:
    """The networks of the nodes, one per node.

    Parameters
    ----------
    model, models, state_dicts, width
        As a caller of `merge` gave them.

    Raises
    ------
    ConfigError
        When they do not go together.
    """
    if models is None:
        raise ConfigError("width is for nodes of different widths: pass models, one module per node")
    if model is not None:
        raise ConfigError("model and models are both given: pass models alone for nodes of different widths")
    found = list(models) if isinstance(models, Iterable) and not isinstance(models, nn.Module) else []
    if not found or not all(isinstance(each, nn.Module) for each in found):
        raise ConfigError("models is not a sequence of modules, expected one module per node such as [Net(1), Net(2)]")
    if len(found) != len(state_dicts):
        raise ConfigError(f"models: got {len(found)}, expected one for each of the {len(state_dicts)} nodes")
    _check_width(width, found)
    return found


def one_width(models: Sequence[nn.Module], width: nn.Module | int | None) -> bool:
    """Whether all networks have the same modules, and tensors of the same names and shapes.

    Networks of which this is false are traced and compared, so that other modules of the same shapes are refused.
    """
    every = [*models, width] if isinstance(width, nn.Module) else list(models)
    looks = [
        (repr(each), {name: value.shape for name, value in each.state_dict().items()})
        for each in {id(each): each for each in every}.values()
    ]
    return all(own == looks[0] for own in looks)


def _check_width(width: object, models: Sequence[nn.Module]) -> None:
    """Raise `ConfigError` unless `width` is None, a module, or a number in `models`."""
    number = isinstance(width, int) and not isinstance(width, bool) and 0 <= width < len(models)
    if not (width is None or isinstance(width, nn.Module) or number):
        raise ConfigError(
            f"width is {width!r}, expected a number in models (0 to {len(models) - 1}) or a module of that width"
        )


def _none_is_widest(networks: Sequence[Network]) -> str:
    found = [sizes(each.spec) for each in networks]
    largest = {name: max(range(len(found)), key=lambda place: found[place][name]) for name in found[0]}
    examples = {networks[place].name: name for name, place in largest.items()}
    listed = ", ".join(f"{owner} in group {name!r}" for owner, name in examples.items())
    return f"no network has room for the units of all others (the largest is {listed}); pass a wider one as width"
