"""Clients' answers as tensors by name, and back: centred, per row, and symmetric matrices as triangles.

Centring first keeps a small spread beside a large mean, also in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ParamsError
from c2m3_fl.merging.recalibrate.from_clients.plan import Question, Role, skip_beside, triangle
from c2m3_fl.merging.recalibrate.from_clients.sketch import Centred, SketchAnswer, SketchedFit, held_out_size
from c2m3_fl.merging.recalibrate.from_clients.sums import Answer, FitAnswer, GramAnswer, Measured, MomentsAnswer
from c2m3_fl.merging.recalibrate.ridge import Sums
from c2m3_fl.network.moments import Moments
from c2m3_fl.network.operators import Operator
from c2m3_fl.network.program import Program
from c2m3_fl.network.rows import weight_matrix

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # by name the element type and the shape

_MANY = 2**53  # rows: floats do not count so far
_LIFT = 1e-4  # of the mean diagonal: what float32 may take from a positive semidefinite matrix
_CONSTANT = 1e-12  # variance of an input, relative to its squared mean, that comes from rounding
_LARGE = 1e30  # values beyond it overflow when they are squared in float32


def pack(answer: Measured, dtype: torch.dtype) -> dict[str, Tensor]:
    """An answer as tensors by name; sums and sketches in the given type, channel moments in float64."""
    if isinstance(answer, MomentsAnswer):
        parts = {"merged": answer.merged, **({} if answer.own is None else {"own": answer.own})}
        return {f"{part}/{name}": value for part, each in parts.items() for name, value in _moments(each).items()}
    if isinstance(answer, GramAnswer):
        return {f"inputs/{name}": value for name, value in _inputs(answer.sums, dtype).items()}
    found: dict[str, Tensor] = {}
    if isinstance(answer, SketchAnswer):
        for part, sketch in (("train", answer.train), ("held-out", answer.held_out)):
            found |= {f"{part}/{name}": value for name, value in _sketch(sketch.centred(), dtype).items()}
        return found
    for part, sums, further in (
        ("train", answer.train, answer.sum_train),
        ("held-out", answer.held_out, answer.sum_held_out),
    ):
        found |= {f"{part}/{name}": value for name, value in _inputs(sums, dtype).items()}
        for target, each in (("own", sums), ("sum", further)):
            if each is not None:
                found |= {f"{part}/{target}/{name}": value for name, value in _residuals(each, dtype).items()}
    return found


def expected(
    program: Program, operator: Operator, params: Params, step: Question, channels: int, double: bool
) -> Shapes:
    """Element types and shapes of the tensors that an answer about an operator holds.

    Parameters
    ----------
    program : Program
        The traced network.
    operator : Operator
        Which operator.
    params : mapping of str to Tensor
        A state dict, for the shapes.
    step : Question
        What is asked about it.
    channels : int
        Its number of channels.
    double : bool
        Whether sums are in float64.
    """
    wide, role = "float64" if double else "float32", step.role
    if role in (Role.MOMENTS, Role.STATISTICS):
        parts = ("merged", "own") if role is Role.MOMENTS else ("merged",)
        return {f"{part}/{name}": entry for part in parts for name, entry in moments_shapes(channels).items()}
    groups, inputs, outputs = weight_matrix(operator, params[operator.weight]).shape
    rows: Shapes = {"count": ("int64", ()), "x": (wide, (groups, inputs)), "xx": (wide, (groups, triangle(inputs)))}
    if role is Role.GRAM:
        return {f"inputs/{name}": entry for name, entry in rows.items()}
    sizes = {"train": step.sketch, "held-out": held_out_size(step.sketch)}
    targets = ("own",) if skip_beside(program, operator) is None else ("own", "sum")
    found: Shapes = {}
    for part, size in sizes.items():
        if step.sketch:
            one = {"count": rows["count"], "x": rows["x"], "xs": (wide, (groups, size, inputs))}
            residuals: Shapes = {"r": (wide, (groups, outputs)), "rs": (wide, (groups, size, outputs))}
        else:
            one, mean = rows, (wide, (groups, outputs))
            residuals = {"r": mean, "xr": (wide, (groups, inputs, outputs)), "rr": mean}
        found |= {f"{part}/{name}": entry for name, entry in one.items()}
        found |= {f"{part}/{target}/{name}": entry for target in targets for name, entry in residuals.items()}
    return found


def moments_shapes(channels: int) -> Shapes:
    """Element types and shapes of channel moments."""
    return {"count": ("int64", ()), "mean": ("float64", (channels,)), "deviation": ("float64", (channels,))}


def unpack(tensors: Mapping[str, Tensor], role: Role) -> Answer:
    """The inverse of `pack`.

    Raises
    ------
    ParamsError
        When no data can have these sums or moments.
    """
    if role in (Role.MOMENTS, Role.STATISTICS):
        own = read_moments(tensors, "own") if role is Role.MOMENTS else None
        return MomentsAnswer(read_moments(tensors, "merged"), own)
    if role is Role.GRAM:
        return GramAnswer(_read_sums(tensors, "inputs", ""))
    if "train/xs" in tensors:
        return SketchedFit(_read_sketch(tensors, "train"), _read_sketch(tensors, "held-out"))
    train, held_out = (_read_sums(tensors, part, f"{part}/own") for part in ("train", "held-out"))
    if "train/sum/r" not in tensors:
        return FitAnswer(train, held_out)
    further = (_read_sums(tensors, part, f"{part}/sum") for part in ("train", "held-out"))
    return FitAnswer(train, held_out, *further)


def read_moments(tensors: Mapping[str, Tensor], part: str) -> Moments:
    """Channel moments from the tensors whose names start with `part`.

    Raises
    ------
    ParamsError
        When no data can have these moments.
    """
    count, mean, deviation = (tensors[f"{part}/{name}"] for name in ("count", "mean", "deviation"))
    _check_count(int(count))
    _check_values([mean, (deviation / count).sqrt()])
    return Moments(int(count), mean.double(), deviation.double())


def expected_channels(operator: Operator, params: Params) -> int:
    """Number of an operator's channels."""
    shape = operator.node.meta["val"].shape
    axes = operator.channel_axes(params) if operator.weight else (operator.layout.channel,)
    return torch.Size(shape[axis] for axis in axes).numel()


def _moments(moments: Moments) -> dict[str, Tensor]:
    return {"count": torch.tensor(moments.count), "mean": moments.mean, "deviation": moments.deviation}


def _inputs(sums: Sums, dtype: torch.dtype) -> dict[str, Tensor]:
    rows, columns = _lower(sums.xx.shape[-1])
    count = max(1.0, sums.count)
    gram = sums.gram if sums.count else sums.xx
    varies = _varies(sums)
    gram = torch.where(varies[:, :, None] & varies[:, None, :], gram, 0.0)
    return {
        "count": torch.tensor(int(sums.count)),
        "x": (sums.x / count).to(dtype),
        "xx": gram[:, rows, columns].to(dtype),
    }


def _varies(sums: Sums) -> Tensor:
    """Inputs that are not constant: of a constant, rounding alone would make a variance, and perhaps a negative one."""
    mean, count = sums.x / max(1.0, sums.count), max(1.0, sums.count)
    return sums.xx.diagonal(dim1=-2, dim2=-1) / count - mean.square() > _CONSTANT * mean.square()


def _residuals(sums: Sums, dtype: torch.dtype) -> dict[str, Tensor]:
    count = max(1.0, sums.count)
    mean = sums.r / count
    cross = torch.where(_varies(sums)[:, :, None], sums.cross, 0.0) if sums.count else sums.xr
    variance = (sums.rr / count - mean.square()).clamp_min(0)
    return {"r": mean.to(dtype), "xr": cross.to(dtype), "rr": variance.to(dtype)}


def _sketch(sketch: Centred, dtype: torch.dtype) -> dict[str, Tensor]:
    found = {"count": torch.tensor(sketch.count), "x": sketch.x.to(dtype), "xs": sketch.xs.to(dtype)}
    for target, mean, rows in zip(("own", "sum"), sketch.r, sketch.rs, strict=False):
        found |= {f"{target}/r": mean.to(dtype), f"{target}/rs": rows.to(dtype)}
    return found


def _lower(inputs: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(inputs, inputs)
    return rows, columns


def _read_sums(tensors: Mapping[str, Tensor], part: str, target: str) -> Sums:
    count = int(tensors[f"{part}/count"])
    _check_count(count)
    x, packed = tensors[f"{part}/x"].double(), tensors[f"{part}/xx"].double()
    _check_values([x, packed])
    gram = x.new_zeros(*x.shape, x.shape[1])
    rows, columns = _lower(x.shape[1])
    gram[:, rows, columns] = packed
    gram[:, columns, rows] = packed
    _check_gram(gram)
    empty = x.new_zeros(len(x), 0)
    sums = Sums(count, count * x, empty, count * (gram + x[:, :, None] * x[:, None, :]), x[:, :, None][:, :, :0], empty)
    if not target:
        return sums
    r, cross, variance = (tensors[f"{target}/{name}"].double() for name in ("r", "xr", "rr"))
    _check_values([r, cross, variance])
    _check_cross(gram, cross, variance)
    return replace(
        sums,
        r=count * r,
        xr=count * (cross + x[:, :, None] * r[:, None, :]),
        rr=count * (variance + r.square()),
    )


def _read_sketch(tensors: Mapping[str, Tensor], part: str) -> Centred:
    count = int(tensors[f"{part}/count"])
    _check_count(count)
    targets = [target for target in ("own", "sum") if f"{part}/{target}/r" in tensors]
    x, xs = (tensors[f"{part}/{name}"].double() for name in ("x", "xs"))
    r, rs = (tuple(tensors[f"{part}/{target}/{name}"].double() for target in targets) for name in ("r", "rs"))
    _check_values([x, xs, *r, *rs])
    return Centred(count, x, r, xs, rs)


def _check_count(count: int) -> None:
    if not 1 <= count < _MANY:
        raise ParamsError(f"the answer is of {count} rows, expected a whole number from 1 to {_MANY - 1}")


def _check_values(values: list[Tensor]) -> None:
    for value in values:
        if not bool((value.abs() < _LARGE).all()):  # NaN compares as false
            raise ParamsError(f"the answer holds NaN or values beyond {_LARGE:g}, expected finite numbers")


def _check_gram(gram: Tensor) -> None:
    """Raise `ParamsError` unless matrices are positive semidefinite up to rounding."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.mean(-1).clamp_min(torch.finfo(torch.float64).tiny)[:, None, None]
    lifted = gram / scale + _LIFT * torch.eye(gram.shape[-1], dtype=gram.dtype)
    if bool((diagonal < 0).any()) or bool(torch.linalg.cholesky_ex(lifted).info.any()):
        raise ParamsError("sums are of no data: the second moments of the inputs are not positive semidefinite")


def _check_cross(gram: Tensor, cross: Tensor, variance: Tensor) -> None:
    """Raise `ParamsError` where a covariance exceeds what both variances allow."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.mean(-1, keepdim=True)
    bound = (diagonal + _LIFT * scale)[:, :, None] * (variance + _LIFT * variance.mean())[:, None, :]
    if bool((variance < 0).any()) or bool((cross.square() > bound * (1 + _LIFT)).any()):
        raise ParamsError("sums are of no data: inputs and residuals correlate by more than one")
