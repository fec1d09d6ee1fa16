"""Content of a calibration batch's elements: inputs, masks or labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from c2m3_fl.errors import CalibrationError

_TOKENS = (torch.int32, torch.int64)  # types of token ids; uint8 is refused: most likely an unscaled image


def split_labels(value: Any, inputs: Tensor) -> tuple[Tensor | None, str]:  # noqa: ANN401  # users' loaders yield anything
    """Labels and "", or None and the type and shape of a value that does not hold class indices."""
    if is_labels(value, inputs):
        return value, ""
    what = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    return None, what


def is_labels(value: Any, inputs: Tensor) -> bool:  # noqa: ANN401  # as above
    """Whether a value can be class indices: one integer per input."""
    integral = isinstance(value, Tensor) and not value.is_floating_point()
    return integral and tuple(value.shape) == tuple(inputs.shape[:1])


def check_input(value: Any, who: str, *, first: bool) -> None:  # noqa: ANN401  # as above
    """Raise `CalibrationError` unless a value is a tensor of finite floats, of token ids, or a mask.

    Parameters
    ----------
    value : object
        An element of a batch.
    who : str
        What to call it in the error.
    first : bool
        Whether it is the first input, which cannot be a mask.
    """
    if not isinstance(value, Tensor):
        raise CalibrationError(f"{who} is a {type(value).__name__}, expected a tensor")
    if value.numel() == 0:
        raise CalibrationError(f"{who} is empty: shape {tuple(value.shape)}")
    if not first and _is_mask(value):
        return
    if not value.is_floating_point() and value.dtype not in _TOKENS:
        raise CalibrationError(f"{who} is of type {value.dtype}, expected floats scaled as in training, or token ids")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise CalibrationError(f"{who} holds NaN or infinite values")


def _is_mask(value: Tensor) -> bool:
    """Whether a tensor can be an attention mask: booleans, or terms of attention scores, some of which are -inf."""
    return value.dtype == torch.bool or (value.is_floating_point() and bool((value <= 0).all()))
