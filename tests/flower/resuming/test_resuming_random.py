"""What is drawn at random, and what strategies change in place, goes on after a kill as if there had been none."""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from torch.utils.data import DataLoader, TensorDataset

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.resuming.resumable import Resumable
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, digits, mlp, same, train
from tests.flower.interrupted import Killed

NODES, ROUNDS = 2, 3


def drawing_app():
    """Clients that draw from every global generator, in the process of the server."""
    app = ClientApp()

    @app.train()
    def fit(message, context):
        model = mlp()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        loader = DataLoader(TensorDataset(*(each[:96] for each in digits())), batch_size=32, shuffle=True)
        for data, labels in loader:
            noisy = data + 0.1 * np.random.rand() * random.random()  # noqa: NPY002  # the global state is what is tested
            train(model, noisy.float(), labels, epochs=1, seed=0, rate=0.05)
        metrics = MetricRecord({"num-examples": 96})
        return Message(RecordDict({"arrays": from_params(model.state_dict()), "metrics": metrics}), reply_to=message)

    return app


def start(make, folder, killed_in=None, evaluate_fn=None):
    def transit(replies):
        if replies and replies[0].metadata.message_type == "train" and next(trained) == killed_in:
            raise Killed
        return replies

    trained, grid = iter(range(1, 100)), SerialGrid(drawing_app(), NODES, transit=transit)
    return make(folder).start(grid, from_params(mlp().state_dict()), num_rounds=ROUNDS, evaluate_fn=evaluate_fn)


def seeded(value):
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002  # as above
    torch.manual_seed(value)


def killed_and_resumed(make, folder):
    """The result of an undisturbed run, and that of one that was killed and went on in another process."""
    seeded(0)
    whole = start(make, folder / "whole")
    seeded(0)
    with pytest.raises(Killed):
        start(make, folder / "halves", killed_in=ROUNDS)
    seeded(12345)  # whatever the new process has
    return whole, start(make, folder / "halves")


def separate(**options):
    inner = FedAvg(fraction_evaluate=0.0)
    return C2M3(inner, model=mlp(), example_inputs=EXAMPLE, alignment="separate", **options)


class Phase(Enum):
    WARM = 1
    HOT = 2


@dataclass
class Progress:
    rounds: list = field(default_factory=list)
    of: object = len  # a function, which stays
    best: float = 0.0


class InPlace(FedAvg):
    """Steps with a torch optimiser, and keeps books in containers that it never replaces."""

    def __init__(self):
        super().__init__(fraction_evaluate=0.0)
        self.net = mlp()
        self.optimiser = torch.optim.Adam(self.net.parameters(), lr=0.01)
        self.seen, self.sums, self.recent, self.progress = [], {"w": np.zeros(2)}, deque(maxlen=2), Progress()
        self.counts, self.named, self.phase, self.scale = Counter(), defaultdict(list), Phase.WARM, torch.ones(())
        self.half = torch.ones(2, dtype=torch.bfloat16)
        self.generator, self.rng, self.dice = (
            torch.Generator().manual_seed(5),
            np.random.default_rng(5),
            random.Random(5),
        )
        self.philox, self.old = np.random.Generator(np.random.Philox(5)), np.random.RandomState(5)
        data = TensorDataset(torch.arange(20.0))
        self.loader = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(6))

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.seen.append((server_round, None))
        self.sums["w"] += server_round
        self.recent.append(server_round)
        self.progress.rounds.append(str(server_round))
        self.progress.best += 0.25
        self.counts[server_round] += 1
        self.named["rounds"].append(b"%d" % server_round)
        self.scale.mul_(0.9)
        self.half.mul_(0.5)
        self.phase = Phase.HOT
        drawn = [torch.rand((), generator=self.generator).item(), next(iter(self.loader))[0][0].item() / 20]
        drawn += [each.random() for each in (self.rng, self.dice, self.philox)] + [self.old.rand()]
        memory = len(self.seen) + self.sums["w"].sum() + sum(self.recent) + len(self.progress.rounds)
        memory += self.progress.best + sum(self.counts.values()) + len(self.named["rounds"]) + float(self.half.sum())
        for parameter, value in zip(self.net.parameters(), arrays.to_torch_state_dict().values(), strict=True):
            parameter.grad = (parameter.detach() - value) * (self.scale + sum(drawn) + 0.01 * float(memory))
        self.optimiser.step()
        return ArrayRecord(self.net.state_dict()), metrics


class Derived(C2M3):
    """A subclass of C2M3 that keeps books of its own."""

    def __init__(self):
        super().__init__(FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE)
        self.kept = []

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.kept.append(server_round)
        metrics["kept"] = list(self.kept)
        return arrays, metrics


def shuffling(generator=None):
    return DataLoader(digits()[0][:60], batch_size=20, shuffle=True, generator=generator)


CASES = {
    "bare": lambda: FedAvg(fraction_evaluate=0.0),
    "noise of fixed clipping": lambda: DifferentialPrivacyServerSideFixedClipping(separate(), 0.1, 1.0, NODES),
    "noise of fixed clipping, bare": lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 1.0, NODES),
    "noise of adaptive clipping": lambda: DifferentialPrivacyServerSideAdaptiveClipping(separate(), 0.1, NODES),
    "state in place, bare": InPlace,
    "state in place": lambda: C2M3(InPlace(), model=mlp(), example_inputs=EXAMPLE),
    "derived from C2M3": Derived,
    "shuffled calibration": lambda: C2M3(
        FedAvg(fraction_evaluate=0.0), model=mlp(), calibration=shuffling(), recalibrate="repair"
    ),
    "calibration shuffled by a generator": lambda: C2M3(
        FedAvg(fraction_evaluate=0.0), model=mlp(), calibration=shuffling(torch.Generator()), recalibrate="repair"
    ),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_a_killed_run_ends_bit_for_bit_as_it_would_have(make, tmp_path):
    whole, resumed = killed_and_resumed(lambda folder: Resumable(make(), folder), tmp_path)
    assert same(resumed.arrays, whole.arrays)
    kept = [[each.get("kept") for each in run.train_metrics_clientapp.values()] for run in (resumed, whole)]
    assert kept[0] == kept[1]


def test_the_generator_of_an_evaluation_is_saved_where_it_is_named(tmp_path):
    drawn = {}

    def evaluated(folder, killed_in=None):
        loader = DataLoader(torch.arange(50), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(3))
        rng = np.random.default_rng(1)

        def evaluate(server_round, arrays):
            drawn.setdefault(folder.name, []).append((next(iter(loader)).tolist(), rng.random()))

        strategy = Resumable(FedAvg(fraction_evaluate=0.0), folder, generators=(loader, rng))
        return start(lambda folder: strategy, folder, killed_in, evaluate)

    evaluated(tmp_path / "whole")
    with pytest.raises(Killed):
        evaluated(tmp_path / "halves", killed_in=2)
    evaluated(tmp_path / "halves")
    assert drawn["halves"] == drawn["whole"]
    with pytest.raises(ConfigError, match="generators holds 0, in the checkpoint there are 2"):
        start(lambda folder: Resumable(FedAvg(), folder), tmp_path / "halves")
    with pytest.raises(ConfigError, match="generators holds 5, expected random generators and data loaders"):
        Resumable(FedAvg(), tmp_path, generators=[5])


def test_calibration_data_that_differ_from_start_to_start_are_refused(tmp_path):
    rng = np.random.default_rng(0)

    def make(folder):
        noisy = digits()[0][:60] + torch.from_numpy(rng.random((60, 64)).astype(np.float32))
        return Resumable(C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), calibration=[noisy]), folder)

    with pytest.raises(Killed):
        start(make, tmp_path, killed_in=2)
    with pytest.raises(ConfigError, match="the calibration data are not those that the checkpoints were made with"):
        start(make, tmp_path)


class Late(InPlace):
    """Makes its optimiser in the first round."""

    def __init__(self):
        super().__init__()
        self.optimiser = None

    def aggregate_train(self, server_round, replies):
        if self.optimiser is None:
            self.optimiser = torch.optim.Adam(self.net.parameters(), lr=0.01)
        return super().aggregate_train(server_round, replies)


def test_an_object_that_cannot_take_its_state_back_is_named(tmp_path):
    with pytest.raises(Killed):
        start(lambda folder: Resumable(Late(), folder), tmp_path, killed_in=2)
    with pytest.raises(ConfigError, match=r"the state of Late\.optimiser, a Adam, but there is None: create it in the"):
        start(lambda folder: Resumable(Late(), folder), tmp_path)


class Broken:
    def state_dict(self):
        raise RuntimeError("later")

    def load_state_dict(self, state):
        raise RuntimeError("never")


def test_what_cannot_be_saved_is_said_once_and_again_when_resumed(tmp_path, caplog):
    class Opaque(FedAvg):
        def __init__(self):
            super().__init__(fraction_evaluate=0.0)
            self.stream, self.constant, self.broken = iter([1, 2, 3]), (lambda: 5), Broken()

        def aggregate_train(self, server_round, replies):
            self.made = [lambda: server_round]
            next(self.stream)
            return super().aggregate_train(server_round, replies)

    start(lambda folder: Resumable(Opaque(), folder), tmp_path)
    said = [text for text in caplog.messages if "is not saved" in text]
    assert len(said) == 2
    assert "attribute 'stream' of type list_iterator is not saved" in said[0]
    assert "attribute 'made' of type list is not saved" in said[1]
    start(lambda folder: Resumable(Opaque(), folder), tmp_path)
    assert "Opaque.made was not saved: it begins anew" in caplog.messages
