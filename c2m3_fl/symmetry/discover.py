"""The permutation symmetries of a network: derived by tracing, proven on numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.errors import ConfigError
from c2m3_fl.network.calibration import ExampleInputs, inputs_beside
from c2m3_fl.network.calls import Outputs, choose_outputs
from c2m3_fl.symmetry.accept import Invariance, prove, require, smallest
from c2m3_fl.symmetry.derive import derive, tensors, trace
from c2m3_fl.symmetry.folding import Folding, find_folding
from c2m3_fl.symmetry.proof import Prover
from c2m3_fl.symmetry.proof_settings import ProofSetting, survey
from c2m3_fl.symmetry.rotations import prove_rotations, prover

__all__ = ["check_invariance", "derive", "permutation_spec", "prove", "require_invariance"]

_SHOWN = 5  # names in a warning


def permutation_spec(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    outputs: Outputs | None = None,
    pin: Iterable[str] = (),
    rotations: bool = False,
) -> PermutationSpec:
    """Derive which units of a network may be permuted without changing its function.

    `torch.export` turns the network into a graph of ATen operators. One rule per operator says which axes carry the
    same units. Axes that no rule covers are pinned and listed in `spec.pins`. The spec is then checked on numbers: a
    group that changes the outputs is pinned as well.

    Parameters
    ----------
    model : nn.Module
        The network; neither its parameters nor its modes are changed.
    example_inputs : Tensor, tuple or dict
        Arguments of one call: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
    outputs : str, int or sequence of them, optional
        The outputs that the caller reads, by key, field or place: ``"logits"``. By default all tensors among them.
    pin : iterable of str
        Parameters that must stay: ``"conv1.weight"``, or one axis of one, ``"conv1.weight:1"``.
    rotations : bool
        Whether groups that linear operators alone read are rotated instead of permuted: residual streams, and the
        insides of heads. Such a spec is of *folded* params, see `fold`.

    Returns
    -------
    PermutationSpec
        The groups, where their units are, and every pinned axis with its reason. ``print`` shows all of it.

    Raises
    ------
    TraceError
        When the network cannot be called with the example inputs, or `torch.export` refuses it.
    SpecError
        When `pin` names a tensor or an axis that the network does not have.
    ConfigError
        When `outputs` names an output that the network does not have, or `rotations` is not a bool.

    Examples
    --------
    The six hidden units of two layers form one group; inputs and outputs are pinned:

    >>> import torch
    >>> from torch import nn
    >>> from c2m3_fl import permutation_spec
    >>> network, inputs = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4)
    >>> spec = permutation_spec(network, inputs)
    >>> spec.groups
    {'0': Group(size=6, parent=None, kind='permutation')}
    >>> spec.members("0")
    (('0.weight', 0), ('0.bias', 0), ('2.weight', 1))
    >>> [(pin.tensor, pin.axis, pin.reason) for pin in spec.pins][-1]
    ('2.bias', 0, 'network output')

    Units that another part of the program addresses by their index can be pinned by name:

    >>> permutation_spec(network, inputs, pin=["0.weight:0"]).groups
    {}

    A network whose control flow depends on values cannot be traced. The error names the line. Rewrite it:

    >>> class Branch(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(4, 2)
    ...
    ...     def forward(self, x):
    ...         return self.layer(x) if x.sum() > 0 else self.layer(-x)
    >>> permutation_spec(Branch(), inputs)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    c2m3_fl.errors.TraceError: torch.export cannot trace Branch ... use torch.where or torch.cond, ...
    >>> Branch.forward = lambda self, x: self.layer(torch.where(x.sum() > 0, x, -x))
    >>> permutation_spec(Branch(), inputs).groups  # inputs and outputs only: nothing may move
    {}
    """
    if rotations not in (True, False):
        raise ConfigError(f"rotations is {rotations!r}, expected True or False")
    inputs, model = inputs_beside(model, example_inputs), choose_outputs(model, outputs)
    folding = find_folding(model, example_inputs) if rotations else None
    found = trace(model, inputs, pin=pin, folded=None if folding is None else folding.scales)
    provers = _provers(model, found.settings)
    _warn(model, found.unused, provers)
    spec = prove(found.spec, *provers)
    if folding is None or not found.kinds.keys() & spec.groups.keys():
        return spec
    return prove_rotations(spec, found.kinds, folding, _provers(model, found.settings, folding))


def _provers(model: nn.Module, settings: Iterable[ProofSetting], folding: Folding | None = None) -> list[Prover]:
    return [prover(model, setting, folding) for setting in settings]


def _folded(model: nn.Module, spec: PermutationSpec, inputs: ExampleInputs) -> Folding | None:
    """The folding of the params that a spec is of; None for a spec of permutations alone."""
    return find_folding(model, inputs) if spec.rotations else None


def _warn(model: nn.Module, unused: tuple[str, ...], provers: list[Prover]) -> None:
    """Say what the caller should know about a network from which a spec is derived."""
    if unused:
        more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
        warnings.warn(
            f"forward() of {type(model).__name__} does not use {', '.join(unused[:_SHOWN])}{more}: nothing is known "
            "about their units, so they are averaged in their present order. Pass a module whose forward() runs all "
            "of the network, such as a wrapper that returns the outputs of every part, or leave them out of it",
            stacklevel=3,
        )
    broken = [
        name for name, value in tensors(model).items() if value.is_floating_point() and not value.isfinite().all()
    ]
    params = dict(model.named_parameters(remove_duplicate=False))
    if broken := [name for name in broken if name in params]:
        warnings.warn(
            f"parameters {broken[:_SHOWN]} hold entries that are not finite: the groups are proven with random numbers "
            "in their place",
            stacklevel=3,
        )
    if not any(prover.tells for prover in provers):
        warnings.warn(
            f"all outputs of {type(model).__name__} are zero or not finite for these inputs: its groups are proven by "
            "the results inside the network alone",
            stacklevel=3,
        )


def check_invariance(
    model: nn.Module,
    spec: PermutationSpec,
    example_inputs: ExampleInputs,
    *,
    outputs: Outputs | None = None,
    draws: int = 1,
    seed: int = 0,
) -> Invariance:
    """Largest relative change of any output under random permutations and rotations of all groups at once.

    The comparison runs on a copy of the network in evaluation mode and in double precision (in single precision if
    the network requires it). Constant tensors (heads of zeros, layer scales, new BatchNorm statistics) are randomised.

    Parameters
    ----------
    model : nn.Module
        The network; it is not changed.
    spec : PermutationSpec
        The spec to check.
    example_inputs : Tensor, tuple or dict
        Arguments of one call: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
    outputs : str, int or sequence of them, optional
        The outputs that the caller reads, by key, field or place: ``"logits"``. By default all tensors among them.
    draws : int
        Number of random permutations.
    seed : int
        Seed of the permutations and of the randomised tensors.

    Returns
    -------
    Invariance
        A float: rounding stays below 1e-9 in double and below 1e-4 in single precision; infinite if all outputs are
        zero or not finite. Its attribute `power` holds, for every group on several axes, the smallest change that a
        wrong permutation of one of them alone would cause.

    Raises
    ------
    ParamsError
        When the spec does not describe this network's tensors.
    TraceError
        When the network cannot be called with the example inputs.

    Examples
    --------
    A spec by hand for two layers, in which the columns of the second layer follow the hidden units:

    >>> import torch
    >>> from torch import nn
    >>> from c2m3_fl import Group, PermutationSpec, Segment, TensorSpec, check_invariance
    >>> network, inputs = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4)
    >>> units = (Segment.contiguous("hidden", 6),)
    >>> tensors = {
    ...     "0.weight": TensorSpec((6, 4), (units, ())),
    ...     "0.bias": TensorSpec((6,), (units,)),
    ...     "2.weight": TensorSpec((2, 6), ((), units)),
    ...     "2.bias": TensorSpec((2,), ((),)),
    ... }
    >>> check_invariance(network, PermutationSpec({"hidden": Group(6)}, tensors), inputs) < 1e-9
    True

    If the columns are forgotten, the outputs change. `require_invariance` names the group at fault; correct its
    segments, or derive the spec by `permutation_spec`:

    >>> tensors["2.weight"] = TensorSpec((2, 6), ((), ()))
    >>> wrong = PermutationSpec({"hidden": Group(6)}, tensors)
    >>> check_invariance(network, wrong, inputs) > 0.01
    True
    >>> from c2m3_fl.symmetry import require_invariance
    >>> require_invariance(network, wrong, inputs)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    c2m3_fl.errors.SpecError: groups ['hidden'] change the outputs or ... (relative error ...); correct their ...
    """
    spec.check(tensors(model), "model")
    model = choose_outputs(model, outputs)
    folding = _folded(model, spec, example_inputs)
    one = prover(model, ProofSetting(training=False, inputs=inputs_beside(model, example_inputs)), folding, seed=seed)
    error = max(one.error(spec) for _ in range(draws))
    return Invariance(error, smallest(one.power(spec), spec.groups))


def require_invariance(model: nn.Module, spec: PermutationSpec, example_inputs: ExampleInputs) -> None:
    """Accept a spec written by hand only if it fits the network and all of its groups preserve the function.

    Parameters
    ----------
    model : nn.Module
        The network; it is not changed.
    spec : PermutationSpec
        The spec to check.
    example_inputs : Tensor, tuple or dict
        Arguments of one call, as for `check_invariance`.

    Raises
    ------
    ParamsError
        When the spec does not describe this network's tensors.
    SpecError
        When a permutation that the spec allows changes the outputs, or results inside the network, naming the groups
        at fault; also when a wrong permutation would not show with these inputs.
    """
    spec.check(tensors(model), "model")
    settings = survey(model, inputs_beside(model, example_inputs)).distinct
    require(spec, _provers(model, settings, _folded(model, spec, example_inputs)))
