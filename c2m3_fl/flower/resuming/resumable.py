"""A strategy that survives the death of its server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from logging import ERROR, INFO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore import log
from torch.utils.data import DataLoader

from c2m3_fl.core.state_dicts import digest
from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.dialect import Evaluate
from c2m3_fl.flower.generators import Generator, global_states, set_global_states
from c2m3_fl.flower.metrics import report_idle
from c2m3_fl.flower.resuming.checkpoint import Checkpoint, Folder
from c2m3_fl.flower.resuming.encoding import Arrays, decode, encode
from c2m3_fl.flower.resuming.state import Kept
from c2m3_fl.flower.rewind import Before
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.flower.wrapped import chain, warn_of_start


@runtime_checkable
class Beginning(Protocol):
    """A strategy that must know when a run begins, and how long it is."""

    def begin_run(self, num_rounds: int, evaluate_config: ConfigRecord | None = None) -> None:
        """Begin a run of so many rounds."""


_KINDS = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")
_DRAWN = "generators/"  # prefix of their arrays


class Resumable(Strategy):
    """Save the federation after every round, and go on from there when started again.

    Works around any strategy. After a crash, start the same server app on the same folder: it continues with the
    round that was lost, with the model, the strategies' state, the metrics and the random numbers of the round
    before it, and ends with the model that an undisturbed run would have ended with.

    Parameters
    ----------
    strategy : Strategy
        What aggregates.
    folder : str or Path
        Where the checkpoints go; an absolute path, because Flower runs server apps in a folder of its own.
    keep : int
        How many of the latest checkpoints to keep.
    generators : iterable of random generators and data loaders
        Saved as well, beside the global ones of Python, NumPy and torch and those that are attributes of a strategy:
        what the server's own evaluation draws from, say.

    Raises
    ------
    ConfigError
        When `keep` is less than one, or `generators` holds something else.

    Examples
    --------
    Two lines in a server app::

        strategy = Resumable(C2M3(FedAvg(), model=net, calibration=loader), "/var/lib/federation")
        result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=50)
    """

    def __init__(
        self,
        strategy: Strategy,
        folder: str | Path,
        *,
        keep: int = 2,
        generators: Iterable[Generator | DataLoader[Any]] = (),
    ) -> None:
        self.strategy = strategy
        self.folder = Folder(folder, keep)
        self.generators = list(generators)
        for each in self.generators:
            if not isinstance(each, Generator | DataLoader):
                raise ConfigError(f"generators holds {each!r}, expected random generators and data loaders")
        warn_of_start(_not_warned_of(strategy))
        self._kept = Kept(strategy)
        self._done = self._rounds = 0
        self._result = Result()
        self._data: list[str] = []

    @property
    def wrapped(self) -> Strategy:
        """The strategy that was passed."""
        return self.strategy

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Evaluate | None = None,
    ) -> Result:
        """Run the rounds that are not yet done; see `Strategy.start`.

        Raises
        ------
        DataError
            When there are checkpoints and every one of them is damaged, when the folder cannot be written to, or when
            another server is in it.
        ConfigError
            When the checkpoints are of other strategies, of another model, of other calibration data or of another
            number of generators.
        """
        self._done, self._rounds, self._result = 0, num_rounds, Result(arrays=initial_arrays)
        with self.folder.opened():
            for each in chain(self.strategy):
                if isinstance(each, Beginning):
                    each.begin_run(num_rounds, evaluate_config)
            self._data = _calibration_digests(self.strategy)
            self.folder.load(partial(self._resume, initial_arrays))
            if self._done >= num_rounds:
                log(INFO, "nothing to do: round %d of %d is done", self._done, num_rounds)
                return self._result
            super().start(
                grid,
                self._result.arrays,
                num_rounds - self._done,
                timeout,
                train_config,
                evaluate_config,
                self._at_the_end_of_a_round(evaluate_fn),
            )
        report_idle(self._result, num_rounds)
        return self._result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy configure the round, counted from the very first start."""
        if self._done:  # Flower counts anew
            log(INFO, "\t> resumed: this is round %d of %d", self._done + server_round, self._rounds)
        return self.strategy.configure_train(self._done + server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the wrapped strategy aggregate."""
        current = self._done + server_round
        arrays, metrics = self.strategy.aggregate_train(current, replies)
        if metrics is not None:
            self._result.train_metrics_clientapp[current] = metrics
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy configure the evaluation."""
        return self.strategy.configure_evaluate(self._done + server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Let the wrapped strategy aggregate the evaluation."""
        current = self._done + server_round
        metrics = self.strategy.aggregate_evaluate(current, replies)
        if metrics is not None:
            self._result.evaluate_metrics_clientapp[current] = metrics
        return metrics

    def summary(self) -> None:
        """Log where the checkpoints are, and the wrapped strategy's configuration."""
        log(INFO, "\t├──> Checkpoints: %s, after round %d", self.folder.path, self._done)
        self.strategy.summary()

    def _at_the_end_of_a_round(self, evaluate_fn: Evaluate | None) -> Evaluate:
        """Flower's last act in every round is the server's own evaluation: evaluate, then save."""

        def evaluate_and_save(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            current = self._done + server_round
            if server_round == 0 and self._done:
                return None  # evaluated before the crash
            self._result.arrays = arrays
            try:
                metrics = evaluate_fn(current, arrays) if evaluate_fn else None
                if metrics is not None:
                    self._result.evaluate_metrics_serverapp[current] = metrics
            finally:  # an evaluation that raises does not cost the round that was trained
                if server_round:
                    self._save(current)
            return metrics

        return evaluate_and_save

    def _save(self, current: int) -> None:
        state, strategies = self._kept.capture()
        drawn: Arrays = {}
        drawn_from = [encode(each, drawn) for each in (global_states(), *self.generators)]
        state |= {f"{_DRAWN}{key}": value for key, value in drawn.items()}
        notes = {"strategies": strategies, "generators": drawn_from, "calibration": self._data}
        metrics = {kind: _plain(getattr(self._result, kind)) for kind in _KINDS}
        arrays = {name: array.numpy() for name, array in self._result.arrays.items()}
        try:
            self.folder.save(Checkpoint(current, arrays, state, notes, metrics))
        except OSError as error:  # training goes on with a full disk; the checkpoint before this one still counts
            log(ERROR, "checkpoint of round %d could not be written: %s", current, error)

    def _resume(self, initial: ArrayRecord, found: Checkpoint) -> None:
        """Take a checkpoint over; where it is damaged, the strategies are left as they were made."""
        _check_same_model(initial, found)
        _, *saved = found.notes["generators"]
        if len(saved) != len(self.generators):
            raise ConfigError(f"generators holds {len(self.generators)}, in the checkpoint there are {len(saved)}")
        if found.notes["calibration"] != self._data:
            raise ConfigError(
                "the calibration data are not those that the checkpoints were made with, so the run would end with "
                "another model; pass the same data, transformed without random numbers, or use another folder"
            )
        result = Result(arrays=ArrayRecord({name: Array(value) for name, value in found.arrays.items()}))
        for kind in _KINDS:
            rounds = {int(current): MetricRecord(values) for current, values in found.metrics[kind].items()}
            getattr(result, kind).update(rounds)
        before = Before(self.strategy)
        try:
            self._kept.restore(found.state, found.notes["strategies"])
            drawn = {key.removeprefix(_DRAWN): value for key, value in found.state.items() if key.startswith(_DRAWN)}
            states, *_ = [
                decode(node, drawn, own, "generators")
                for node, own in zip(found.notes["generators"], [None, *self.generators], strict=True)
            ]
            set_global_states(states)
        except Exception:
            before.rewind()
            raise
        self._done, self._result = found.round, result


def _not_warned_of(strategy: Strategy) -> Iterator[Strategy]:
    """The wrapped strategies as far as a C2M3, which looks after those that it wraps itself."""
    for each in chain(strategy):
        yield each
        if isinstance(each, C2M3):
            return


def _check_same_model(initial: ArrayRecord, found: Checkpoint) -> None:
    """Raise `ConfigError` where a checkpoint holds another model than the run starts from."""
    expected = {name: tuple(array.shape) for name, array in initial.items()}
    saved = {name: value.shape for name, value in found.arrays.items()}
    for name in sorted(expected.keys() | saved.keys()):
        if expected.get(name) != saved.get(name):
            shapes = f"has shape {saved.get(name)} there and {expected.get(name)} in the initial arrays"
            raise ConfigError(f"the checkpoint is of another model: {name!r} {shapes}; use another folder")


def _calibration_digests(strategy: Strategy) -> list[str]:
    """Digests of the calibration data of every C2M3 in the chain: a loader that shuffles gives other ones."""
    digests = []
    for each in chain(strategy):
        if isinstance(each, C2M3):
            batches = enumerate(each.setup.data.batches)
            digests.append(
                digest(
                    {f"{place}/{index}": value for place, batch in batches for index, value in enumerate(batch.inputs)}
                )
            )
    return digests


def _plain(metrics: dict[int, MetricRecord]) -> dict[str, dict[str, Any]]:
    return {str(current): dict(record) for current, record in metrics.items()}
