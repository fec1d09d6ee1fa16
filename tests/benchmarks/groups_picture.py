"""The picture of groups: the parameters of a small residual network, before and after a permutation of its units.

    python -m tests.benchmarks.groups_picture FILE

derives the network's spec and draws every tensor as a grid. A strip at a side of a grid shows which unit each
row or column belongs to: one colour per group, one shade per unit, grey where the axis is pinned.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from c2m3_fl.core.permutation import Permutation, apply, identity, random
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.symmetry.discover import permutation_spec

_COLOURS = ("Blues", "Oranges", "Greens", "Purples")  # one colour map per group
_PINNED = "0.82"
_GAP = 0.35  # cells between a grid and its strips
_DEPTH = 0.75  # of a strip, in cells
_SPACE = 2.6  # cells between tensors


class Residual(nn.Module):
    """Two branches whose sum is read out: one group for the stream, one for the hidden layer of the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 6)
        self.up = nn.Linear(6, 4)
        self.down = nn.Linear(4, 6)
        self.leave = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        stream = self.enter(x)
        stream = stream + self.down(self.up(stream).relu())
        scores: Tensor = self.leave(stream)
        return scores


def _shades(spec: PermutationSpec, perm: Permutation, name: str, axis: int) -> list[str | tuple[float, ...]]:
    """A colour per coordinate of an axis: its group's, as dark as the unit's number, grey where it is pinned."""
    tensor = spec.tensors[name]
    found: list[str | tuple[float, ...]] = [_PINNED] * tensor.shape[axis]
    for segment in tensor.axes[axis]:
        colours = mpl.colormaps[_COLOURS[list(spec.groups).index(segment.group)]]
        for place, unit in zip(segment.positions, perm[segment.group].tolist(), strict=True):
            for coordinate in place:
                found[coordinate] = colours(0.25 + 0.7 * unit / max(1, segment.size - 1))
    return found


def _grid(axes: Axes, left: float, top: float, values: np.ndarray, shades: list[list[str | tuple[float, ...]]]) -> None:
    """A matrix, with a strip at its left for the rows and one above for the columns (vectors: rows only)."""
    scale = float(np.abs(values).max())
    cells = mpl.colormaps["Greys"]
    for row, column in np.ndindex(values.shape):
        shade = cells(0.12 + 0.68 * abs(values[row, column]) / scale)
        axes.add_patch(Rectangle((left + column, top - row - 1), 1, 1, facecolor=shade, edgecolor="white", linewidth=1))
    for row, colour in enumerate(shades[0]):
        corner = (left - _GAP - _DEPTH, top - row - 1)
        axes.add_patch(Rectangle(corner, _DEPTH, 1, facecolor=colour, edgecolor="white", linewidth=1))
    for column, colour in enumerate(shades[1] if len(shades) > 1 else []):
        corner = (left + column, top + _GAP)
        axes.add_patch(Rectangle(corner, 1, _DEPTH, facecolor=colour, edgecolor="white", linewidth=1))


def _network(axes: Axes, spec: PermutationSpec, params: Params, perm: Permutation, title: str) -> None:
    """All tensors in a row, their tops aligned."""
    left, height = 0.0, max(tensor.shape[0] for tensor in spec.tensors.values())
    for name, tensor in spec.tensors.items():
        values = params[name].numpy().reshape(tensor.shape[0], -1)
        shades = [_shades(spec, perm, name, axis) for axis in range(len(tensor.shape))]
        _grid(axes, left, height, values, shades)
        where = (left + values.shape[1] / 2 - (_GAP + _DEPTH) / 2, height + _GAP + _DEPTH + 0.4)
        axes.text(*where, name.replace(".", "\n"), ha="center", va="bottom", fontsize=8)
        left += values.shape[1] + _SPACE
    axes.set_xlim(-_GAP - _DEPTH - 0.2, left - _SPACE + 0.3)
    axes.set_ylim(-0.3, height + 3.1)
    axes.set_title(title, loc="left", fontsize=10, pad=9)
    axes.set_aspect("equal")
    axes.axis("off")


def draw(file: Path) -> None:
    """Draw the network as it is and with its units permuted; the outputs of both are compared and reported."""
    torch.manual_seed(0)
    network, inputs = Residual().double(), torch.randn(5, 3, dtype=torch.float64)
    spec = permutation_spec(network, inputs)
    params = {name: value.detach() for name, value in network.state_dict().items()}
    perm = random(spec, torch.Generator().manual_seed(1))
    moved = apply(spec, perm, params)
    change = (torch.func.functional_call(network, moved, (inputs,)) - network(inputs)).abs().max()
    figure = Figure(figsize=(10, 5.3), layout="constrained")
    above, below = figure.subplots(2, 1)
    _network(above, spec, params, identity(spec), "as initialised")
    same = "outputs unchanged" if float(change.detach()) < 1e-12 else f"outputs change by {float(change.detach()):.1e}"
    _network(below, spec, moved, perm, f"units permuted, the same way wherever their group is: {same}")
    handles = [
        Rectangle(
            (0, 0), 1, 1, facecolor=mpl.colormaps[_COLOURS[index]](0.6), label=f"group {name!r}, {group.size} units"
        )
        for index, (name, group) in enumerate(spec.groups.items())
    ]
    handles.append(Rectangle((0, 0), 1, 1, facecolor=_PINNED, label="pinned: inputs and outputs"))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Draw the picture into a file."""
    parser = argparse.ArgumentParser(description="Draw the picture of groups.")
    parser.add_argument("file", type=Path)
    draw(parser.parse_args().file)


if __name__ == "__main__":
    main()
