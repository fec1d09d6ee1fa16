"""The global random generators: Python's, NumPy's and torch's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def global_states() -> dict[str, Any]:
    """The states of the global generators, those of CUDA devices included where they are in use."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002  # the generator that Flower's noise is drawn from
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]  # torch's
    }


def set_global_states(states: dict[str, Any]) -> None:
    """Put the global generators where they were; of CUDA devices those that are there."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002  # as above
    torch.set_rng_state(states["torch"])
    for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
        torch.cuda.set_rng_state(state, device)


@contextmanager
def undisturbed(seed: int | None = None) -> Iterator[None]:
    """Leave the global generators as they are, whatever is drawn inside; from `seed` where one is given.

    Whose clients train next is drawn from them. With a seed a shuffling loader gives the same batches in every process.
    """
    states = global_states()
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # as above
        torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        set_global_states(states)


Generator = random.Random | torch.Generator | np.random.Generator | np.random.RandomState


def state_of(generator: Generator) -> Any:  # noqa: ANN401  # each kind has its own
    """The state of a random generator, as plain values, arrays and tensors."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state(legacy=False)


def set_state(generator: Generator, state: Any) -> None:  # noqa: ANN401  # as above
    """Put a random generator where it was."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
