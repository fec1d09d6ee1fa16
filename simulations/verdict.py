"""Methods compared cell by cell, paired over seeds, and the rule by which a default is accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import mean, stdev

from scipy.stats import t as student

from simulations.ledger import Measurement, Number, Record

# The rule: a default may lose one point of accuracy on average and three for any seed, and add 5 % to the loss.
_ON_AVERAGE, _FOR_ANY_SEED, _LOSS = -0.01, -0.03, 1.05
_LEVEL = 0.95  # of confidence intervals


@dataclass(frozen=True)
class Pair:
    """A method against the baseline on one cell, after the last round.

    Attributes
    ----------
    gains : tuple of float
        Accuracy minus the baseline's accuracy, per seed.
    loss_ratio : float
        Mean loss divided by the baseline's mean loss; infinite if it is not finite.
    """

    gains: tuple[float, ...]
    loss_ratio: float

    @property
    def mean(self) -> float:
        """Mean gain over seeds."""
        return mean(self.gains)

    @property
    def least(self) -> float:
        """Smallest gain of all seeds."""
        return min(self.gains)

    @property
    def broken(self) -> tuple[str, ...]:
        """The parts of the acceptance rule that do not hold."""
        return tuple(
            part
            for part, holds in (
                ("mean", self.mean >= _ON_AVERAGE),
                ("seed", self.least >= _FOR_ANY_SEED),
                ("loss", self.loss_ratio <= _LOSS),
            )
            if not holds
        )


def cells(record: Record) -> list[Mapping[str, str]]:
    """The cells of a record, in the order of its design."""
    axes = _axes(record)
    found = {tuple(each.cell.items()): each.cell for each in record.measurements}
    levels = {axis: list(values) for axis, values in axes.items()}
    return sorted(found.values(), key=lambda cell: [levels[axis].index(cell[axis]) for axis in levels])


def methods(record: Record) -> list[str]:
    """The methods of a record, in the order in which they ran."""
    return list(dict.fromkeys(each.method for each in record.measurements))


def one_round(record: Record) -> bool:
    """Whether every federation of the record ran for one round."""
    return all(len(each.accuracy) == 1 for each in record.measurements)


def at(record: Record, cell: Mapping[str, str], method: str) -> tuple[Measurement, ...]:
    """Measurements of a method on a cell, in the order of seeds; empty if it did not run."""
    found = [each for each in record.measurements if each.cell == cell and each.method == method]
    return tuple(sorted(found, key=lambda each: each.seed))


def compare(record: Record, cell: Mapping[str, str], method: str, baseline: str) -> Pair | None:
    """A method against the baseline; None if no seed has both."""
    theirs = {each.seed: each for each in at(record, cell, baseline)}
    ours = [each for each in at(record, cell, method) if each.seed in theirs]
    if not ours:
        return None
    gains = tuple(_value(each.accuracy[-1], 0.0) - _value(theirs[each.seed].accuracy[-1], 0.0) for each in ours)
    loss, reference = (
        mean(_value(each.loss[-1], inf) for each in side) for side in (ours, [theirs[each.seed] for each in ours])
    )
    return Pair(gains, 1.0 if loss == reference else loss / reference if reference else inf)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The value, or mean ± sample standard deviation of several; "" for none."""
    if not values:
        return ""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def margin(values: Sequence[float]) -> str:
    """Half the width of Student's 95 % interval for the mean, after a " ± "; "" for a single value."""
    if len(values) < 2:
        return ""
    half = float(student.ppf((1 + _LEVEL) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return f" ± {half:.3f}"


def accuracies(measurements: Sequence[Measurement], number: int = -1) -> list[float]:
    """Accuracy after a round, seed by seed."""
    return [_value(each.accuracy[number], 0.0) for each in measurements]


def losses(measurements: Sequence[Measurement], number: int = -1) -> list[float]:
    """Loss after a round, seed by seed; infinite if it is not finite."""
    return [_value(each.loss[number], inf) for each in measurements]


def _value(number: Number, otherwise: float) -> float:
    return otherwise if number is None else number


def _axes(record: Record) -> Mapping[str, Mapping[str, object]]:
    design = record.about["design"]
    axes = design["axes"] if isinstance(design, Mapping) else {}
    return axes if isinstance(axes, Mapping) else {}
