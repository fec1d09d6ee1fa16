"""Numerical proof: a network with permuted units must compute the same outputs, inside as well as at its end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from c2m3_fl.core.permutation import Permutation, apply
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.errors import TraceError
from c2m3_fl.network.calibration import Inputs
from c2m3_fl.network.calls import tensors_in
from c2m3_fl.network.copying import in_precision, private_copy
from c2m3_fl.network.exporting import aliases, mode, plain_attention, require_runs
from c2m3_fl.symmetry.differences import change, difference, tells
from c2m3_fl.symmetry.generic import generic, generic_inputs
from c2m3_fl.symmetry.moves import Carrier, Move, alone, places, restrict, stirring, turned_alone
from c2m3_fl.symmetry.recording import Recorder, Tape
from c2m3_fl.symmetry.replay import Replayed, replay

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative; rounding alone stays below
_UNREPLAYABLE = (RuntimeError, ValueError, IndexError)  # raised where shapes depend on values
_SIGNS = (1, 2, 3)  # seeds of the signs by which results are turned
VISIBLE = 100.0  # a wrong permutation must change something by as many tolerances


class Prover:
    """A private copy of a network with generic parameters, in double precision where the network allows it.

    Parameters
    ----------
    model : nn.Module
        The network; not mutated.
    inputs : tuple
        Positional and keyword arguments of one call.
    seed : int
        Seed of parameters and permutations.
    training : bool
        Whether to run in training mode, without dropout.
    prepared : callable, optional
        What is done to the generic parameters first, such as folding the scales of norms.

    Raises
    ------
    TraceError
        When the network cannot be called with the inputs, or when its outputs are empty.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        seed: int = 0,
        training: bool = False,
        prepared: Callable[[Params], dict[str, Tensor]] = dict,
    ) -> None:
        self._training = training
        self._prepared = prepared
        self._first_name = aliases(model)
        self._tape: Tape | None = None
        self._base: Replayed | None = None
        self._rescale = True
        self.single = False
        attempts = [(torch.float64, True), (torch.float64, False), (torch.float32, False)]
        for dtype, varied in attempts:
            try:
                self._prepare(model, inputs, dtype, seed, varied=varied)
            except Exception:  # the network insists on a precision, or on its own parameters
                if dtype == torch.float32:
                    with mode(model, training=training):
                        require_runs(model, inputs)
                    raise
            else:
                if self.tells or not varied:
                    break
        if not any(value.numel() for value in self._expected):
            raise TraceError(
                f"{type(model).__name__} returns nothing for the example inputs: they are empty; pass a batch of at "
                "least one example"
            )

    def _prepare(self, model: nn.Module, inputs: Inputs, dtype: torch.dtype, seed: int, *, varied: bool) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        self._module = in_precision(private_copy(model).cpu(), dtype)
        self._inputs = generic_inputs(inputs, dtype, self.generator)
        state: Mapping[str, Any] = self._module.state_dict()
        own = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        buffers = {name for name, _ in self._module.named_buffers(remove_duplicate=False)}
        self._params = self._prepared(generic(own, buffers, self.generator, self._first_name, varied=varied))
        self._expected = self._run(self._params, record=dtype == torch.float64)

    @property
    def tells(self) -> bool:
        """Whether any output is finite and not zero, and so would show a change."""
        return any(tells(leaf) for leaf in self._expected)

    @property
    def sees(self) -> bool:
        """Whether anything would show a change: an output, or a result inside the network."""
        return self.tells or self._replayed() is not None

    @property
    def tolerance(self) -> float:
        """Largest relative error that rounding explains."""
        return TOLERANCE[torch.float32 if self.single else self.dtype]

    def error(self, spec: PermutationSpec, chosen: Collection[str] | None = None) -> float:
        """Largest relative change of any output when all, or the `chosen`, groups are permuted or rotated at random.

        Infinite if all outputs are zero or not finite: then no change would show.
        """
        if not self.tells:
            return float("inf")
        return difference(self._expected, self._run(apply(spec, self._perm(spec, chosen), self._params)))

    def error_of(self, replaced: Callable[[Params], Params]) -> float:
        """Largest relative change of any output when a function replaces the parameters; infinite as above."""
        return difference(self._expected, self._run(replaced(self._params))) if self.tells else float("inf")

    def hidden_error(self, spec: PermutationSpec, chosen: Collection[str] | None = None) -> float:
        """The same for the outputs of the rescaled network and for the results of all operators inside it.

        Groups that rotate stay: results inside the network rotate with them. 0 if the run cannot be replayed.
        """
        if self._tape is None:
            return 0.0
        if spec.rotations:
            chosen = set(spec.groups if chosen is None else chosen).difference(spec.rotations)
        return self._change(apply(spec, self._perm(spec, chosen), self._params))

    def fails(self, spec: PermutationSpec, chosen: Collection[str] | None = None) -> bool:
        """Whether a random permutation of the `chosen` groups (all) changes the outputs, or anything inside."""
        if self.tells and not self.error(spec, chosen) <= self.tolerance:
            return True
        return not self.hidden_error(spec, chosen) <= self.tolerance

    def power(self, spec: PermutationSpec, chosen: Collection[str] | None = None) -> dict[str, dict[Carrier, float]]:
        """By how much a permutation of one carrier alone would change an output, or a result inside the network.

        Parameters
        ----------
        spec : PermutationSpec
            The spec.
        chosen : collection of str, optional
            The groups that are asked about; all by default.

        Returns
        -------
        dict of str to dict
            For every group, its carriers, which are the axes that move with it, and the change, estimated to first
            order and measured where that is too small to show. A group with a single carrier has no wrong permutation
            of this kind, and no entry. Of a group that rotates: its axes of matrices, and the change of the outputs.
        """
        base = self._replayed()
        gradients = base.gradients if base is not None else {}
        found: dict[str, dict[Carrier, float]] = {}
        for name, held in places(spec).items():
            if chosen is not None and name not in chosen:
                continue
            family = (name, *spec.children(name))
            perm = restrict(spec, stirring(spec, self.generator), [name])
            own = [one for one in held if self._first_name.get(one[0], one[0]) == one[0]]
            if spec.groups[name].orthogonal:
                found |= self._rotated(spec, name, own, perm)
                continue
            moves = {one: moved for one in own if (moved := alone(spec, one, family, perm)) is not None}
            if len(moves) > 1:
                found[name] = {one: self._visible(spec, one[0], moved, gradients) for one, moved in moves.items()}
                found[name] |= self._turned(
                    spec, perm, {one: moves[one] for one in moves if self._hides(found[name][one])}
                )
        return found

    def _rotated(
        self, spec: PermutationSpec, group: str, held: list[Carrier], perm: Permutation
    ) -> dict[str, dict[Carrier, float]]:
        """By how much a rotation of one carrier alone changes an output; a vector may have no effect of its own."""
        changes = {}
        for one in held if len(held) > 1 else ():
            if self._params[one[0]].ndim > 1:
                value = turned_alone(spec, one, perm, self._params[one[0]])
                changed = self._run({**self._params, one[0]: value})
                changes[one] = difference(self._expected, changed) if self.tells else 0.0
        return {group: changes} if changes else {}

    def _hides(self, change: float) -> bool:
        return not change >= VISIBLE * self.tolerance

    def _visible(self, spec: PermutationSpec, name: str, moved: Move, gradients: Mapping[str, Tensor]) -> float:
        """The change that the move of one axis alone causes: by the gradient, or measured where that shows nothing."""
        value, whole = self._params[name], spec.tensors[name]
        change = moved.change(value, gradients[name], whole) if name in gradients else 0.0
        return self._change({**self._params, name: moved.apply(value, whole)}) if self._hides(change) else change

    def _turned(self, spec: PermutationSpec, perm: Permutation, moves: Mapping[Carrier, Move]) -> dict[Carrier, float]:
        """The same with results turned at random, if the group passes that: always positive operands hide slopes."""
        found = dict.fromkeys(moves, 0.0)
        if not moves or self._replayed() is None:
            return found
        whole = apply(spec, perm, self._params)
        for signs in _SIGNS:
            base = self._attempt(self._params, signs)
            other = self._attempt(whole, signs)
            if base is None or other is None or not change(base, other) <= self.tolerance:
                return dict.fromkeys(moves, 0.0)
            for (name, axis), moved in moves.items():
                if self._hides(found[name, axis]):
                    value = moved.apply(self._params[name], spec.tensors[name])
                    turned = self._attempt({**self._params, name: value}, signs)
                    found[name, axis] = 0.0 if turned is None else change(base, turned)
        return found

    def _attempt(self, params: Params, signs: int) -> Replayed | None:
        try:
            return self._replay(params, signs=signs)
        except _UNREPLAYABLE:
            return None

    def _perm(self, spec: PermutationSpec, chosen: Collection[str] | None) -> dict[str, Tensor]:
        perm = stirring(spec, self.generator)
        return perm if chosen is None else restrict(spec, perm, chosen)

    def _change(self, params: Params) -> float:
        """Largest relative change, by other parameters, of the outputs or of a result inside the network."""
        base = self._replayed()
        if base is None:
            return difference(self._expected, self._run(params)) if self.tells else 0.0
        try:
            other = self._replay(params)
        except _UNREPLAYABLE:  # shapes that depend on values
            return difference(self._expected, self._run(params)) if self.tells else 0.0
        return change(base, other)

    def _replayed(self) -> Replayed | None:
        """The replay with the prover's own parameters, and its gradients where they exist."""
        if self._base is None and self._tape is not None:
            for gradients, rescale in ((True, True), (True, False), (False, True)):
                try:
                    self._base = self._replay(self._params, gradients=gradients, rescale=rescale)
                except _UNREPLAYABLE:
                    continue
                if all(
                    a.isfinite().all() or not b.isfinite().all()
                    for a, b in zip(self._base.outputs, self._expected, strict=True)
                ):
                    self._rescale = rescale
                    return self._base
            self._base = self._tape = None
        return self._base

    def _replay(
        self, params: Params, *, gradients: bool = False, rescale: bool | None = None, signs: int | None = None
    ) -> Replayed:
        assert self._tape is not None  # callers check
        rescale = self._rescale if rescale is None else rescale
        return replay(self._tape, self._outputs, params, gradients=gradients, rescale=rescale, signs=signs)

    def _run(self, params: Params, *, record: bool = False) -> list[Tensor]:
        buffers = {name for name, _ in self._module.named_buffers(remove_duplicate=False)}
        first = {name: value.clone() if name in buffers or value.ndim == 0 else value for name, value in params.items()}
        first = {name: value for name, value in first.items() if self._first_name.get(name, name) == name}
        args, kwargs = copy.deepcopy(self._inputs)
        with (
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            plain_attention(),
            mode(self._module, training=self._training),
        ):
            torch.manual_seed(0)
            if self.dtype != torch.float64:
                out = functional_call(self._module, first, args, kwargs)
                return [leaf.detach().clone() for leaf in tensors_in(out)]
            recorder = Recorder(first)
            with recorder:
                out = functional_call(self._module, first, args, kwargs)
            leaves = list(tensors_in(out))
            if record:
                self._outputs = [recorder.ref(leaf).number for leaf in leaves]
                self._tape, self.single = recorder.tape, recorder.tape.single
        return [leaf.detach().clone() for leaf in leaves]
