"""All settings of a simulated run: one frozen record, checked when it is made.

The fields are the app's run-config keys (``local_epochs`` is ``local-epochs`` there) and the options of
``c2m3-fl compare``; pyproject.toml repeats the defaults because Flower reads them there.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

from c2m3_fl.errors import ConfigError

Value = str | int | float

ON_SERVER = {  # corrections on the server's images, and their titles
    "batchnorm": "BatchNorm",
    "repair": "REPAIR",
    "refit": "refit",
}
ON_CLIENTS = {  # corrections by what the clients answer
    "client-refit": "client refit",
    "head": "head",
    "client-refit+head": "client refit + head",
}
_PEERS = {  # methods of alignment, and the corrections that they are combined with
    "fedavg": ("FedAvg", {**ON_SERVER, **ON_CLIENTS}),
    "git-rebasin": ("Git Re-Basin", {**ON_SERVER, **ON_CLIENTS}),
    "mergemany": ("MergeMany", {**ON_SERVER, **ON_CLIENTS}),
    "activations": ("Activation matching", {**ON_SERVER, **ON_CLIENTS}),
    "cca": ("CCA Merge", ON_SERVER),  # not permutations, so clients' own networks cannot be asked in its basis
}
TITLES = {  # names of the strategies in simulations/strategies.py, and their titles in tables and pictures
    "fedavg": "FedAvg",
    "fedavgm": "FedAvgM",
    "fedadam": "FedAdam",
    "fedprox": "FedProx",
    "fedmedian": "FedMedian",
    "feddf": "FedDF",
    "fisher": "Fisher average",
    "regmean": "RegMean",
    "task-average": "Task average",
    "ties": "TIES",
    "c2m3": "C2M3",
    "c2m3+default": "C2M3, default",
    "c2m3-rotations": "C2M3, rotations",
    "c2m3-rotations+default": "C2M3, rotations, default",
    "c2m3+default-without-data": "C2M3, default without server data",
    "c2m3+batchnorm": "C2M3 + BatchNorm",
    "c2m3+repair": "C2M3 + REPAIR",
    "c2m3+refit": "C2M3 + refit",
    "c2m3+head": "C2M3 + head",
    "c2m3+client-refit": "C2M3 + client refit",
    "c2m3+client-refit+head": "C2M3 + client refit + head",
    "c2m3+regmean": "C2M3 + RegMean",
    "c2m3+judged": "C2M3, judged by clients",
    "c2m3+repair-fed-back": "C2M3 + REPAIR, fed back",
    "c2m3+refit-fed-back": "C2M3 + refit, fed back",
    "c2m3+repair-moved": "C2M3 + REPAIR, fed back once",
    "c2m3-fedavgm": "C2M3 (FedAvgM)",
    "c2m3-fedadam": "C2M3 (FedAdam)",
    "c2m3-fedprox": "C2M3 (FedProx)",
    "c2m3-fedmedian": "C2M3 (FedMedian)",
    **{
        name: title
        for base, (first, corrections) in _PEERS.items()
        for name, title in (
            (base, first),
            *((f"{base}+{key}", f"{first} + {then}") for key, then in corrections.items()),
        )
    },
}
OUTPUT = "output"  # a run-config key of the app that is not a setting: the folder of the server's results


def _option(
    default: Value,
    meaning: str,
    *,
    choices: Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> Any:  # noqa: ANN401  # what dataclasses.field returns
    """A field with its meaning and its limits, for checks and for help texts."""
    limits = {"choices": tuple(choices), "at_least": at_least, "above": above, "at_most": at_most}
    return field(default=default, metadata={"meaning": meaning, **limits})


@dataclass(frozen=True)
class Settings:
    """One simulated run.

    Raises
    ------
    ConfigError
        For a value of the wrong type, out of range or not among its choices; see `from_run_config` for unknown keys.
    """

    data: str = _option(
        "digits",
        "data set",
        choices=("digits", "mnist", "fashion-mnist", "emnist", "cifar10", "cifar100", "shakespeare"),
    )
    train_size: int = _option(0, "training images of all clients together; 0 takes all", at_least=0)
    test_size: int = _option(0, "test images; 0 takes all", at_least=0)
    image_size: int = _option(0, "images are resized to this many pixels square; 0 keeps them", at_least=0)
    model: str = _option(
        "mlp",
        "network",
        choices=(
            "mlp",
            "cnn",
            "conv3",
            "cnn-pooled",
            "lenet",
            "vgg11",
            "vgg11-bn",
            "vgg16",
            "vgg16-bn",
            "resnet8-bn",
            "resnet20-bn",
            "resnet20-ln",
            "vit",
            "lstm",
            "gpt",
        ),
    )
    hidden_widths: str = _option("256,256", "hidden widths of the MLP, separated by commas")
    width: float = _option(
        1.0, "factor on the channels of convolutional networks, and on the width of transformers and LSTMs", above=0
    )
    clients: int = _option(5, "clients, one per partition of the training images", at_least=1)
    partition: str = _option(
        "dirichlet",
        "how labels are spread over clients; in text, clients are speakers",
        choices=("iid", "dirichlet", "pathological", "shards", "speakers"),
    )
    alpha: float = _option(0.5, "concentration of the Dirichlet partition", above=0)
    classes_per_client: int = _option(
        2, "classes per client in the pathological partition, shards per client in the partition by shards", at_least=1
    )
    initialisation: str = _option(
        "independent",
        "whether clients start round 1 from one model or each from its own",
        choices=("independent", "shared"),
    )
    rounds: int = _option(3, "rounds", at_least=1)
    local_epochs: int = _option(2, "epochs that each client trains per round", at_least=1)
    optimiser: str = _option("sgd", "optimiser of the clients", choices=("sgd", "adam", "adamw"))
    learning_rate: float = _option(0.05, "learning rate of the clients", above=0)
    momentum: float = _option(0.9, "momentum of SGD", at_least=0, at_most=1)
    weight_decay: float = _option(0.0, "weight decay of the clients", at_least=0)
    batch_size: int = _option(32, "batch size of the clients", at_least=1)
    holdout: float = _option(
        0.0, "share of its images that a client evaluates on and does not train on", at_least=0, at_most=0.5
    )
    participation: float = _option(1.0, "share of the clients that train in a round", above=0, at_most=1)
    late_clients: int = _option(0, "clients that join later, each with a network of its own", at_least=0)
    late_round: int = _option(2, "round in which they join", at_least=2)
    strategy: str = _option("fedavg,c2m3,c2m3+repair", "strategies to run one after the other, separated by commas")
    calibration_size: int = _option(200, "unlabelled training images kept by the server for REPAIR", at_least=1)
    seed: int = _option(0, "seed of partition, initialisations and batches", at_least=0)

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for each in fields(self):
            key = each.name.replace("_", "-")
            value = _typed(key, getattr(self, each.name), types[each.name])
            _check_range(key, value, **{name: each.metadata[name] for name in ("at_least", "above", "at_most")})
            if each.metadata["choices"]:
                check_choice(key, value, each.metadata["choices"])
            object.__setattr__(self, each.name, value)
        if self.late_clients >= self.clients:
            raise ConfigError(f"late-clients is {self.late_clients}, expected fewer than the {self.clients} clients")
        if not self.strategies:
            raise ConfigError("strategy is empty, expected names such as 'fedavg,c2m3,c2m3+repair'")
        for name in self.strategies:
            check_choice("strategy", name, tuple(TITLES))
        _ = self.widths

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, object]) -> Settings:
        """Settings from Flower's run config, whose keys have hyphens.

        Raises
        ------
        ConfigError
            For a key that no field has, or a value that the field does not take.
        """
        known = {each.name.replace("_", "-"): each.name for each in fields(cls)}
        values = {key: value for key, value in run_config.items() if key != OUTPUT}
        for key in values:
            check_choice("run-config key", key, tuple(known))
        checked: dict[str, Any] = {known[key]: value for key, value in values.items()}
        return cls(**checked)

    def to_run_config(self) -> dict[str, Value]:
        """The run config that `from_run_config` reads these settings from."""
        return {name.replace("_", "-"): value for name, value in asdict(self).items()}

    @property
    def strategies(self) -> tuple[str, ...]:
        """Names of the strategies, in order, without repetition."""
        return tuple(dict.fromkeys(name.strip() for name in self.strategy.split(",") if name.strip()))

    def joins_in(self, client: int) -> int:
        """The first round of a client."""
        return self.late_round if client >= self.clients - self.late_clients else 1

    def present_in(self, number: int) -> int:
        """How many clients there are in a round."""
        return sum(self.joins_in(client) <= number for client in range(self.clients))

    @property
    def widths(self) -> tuple[int, ...]:
        """Hidden widths of the MLP."""
        try:
            widths = tuple(int(part) for part in self.hidden_widths.split(","))
        except ValueError:
            widths = ()
        if not widths or min(widths) < 1:
            raise ConfigError(f"hidden-widths is {self.hidden_widths!r}, expected positive integers such as '256,256'")
        return widths


def check_choice(key: str, value: object, choices: Sequence[str]) -> None:
    """Raise `ConfigError`, with the nearest choice, if `value` is not one of the choices."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{key} is {value!r}, expected one of {', '.join(choices)}{hint}")


def _typed(key: str, value: Value, kind: type) -> Value:
    """`value` as `kind`; whole numbers may stand for floats, nothing else is converted."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{key} is {value!r}, expected {'a number' if kind is float else f'of type {kind.__name__}'}")
    return value


def _check_range(key: str, value: Value, *, at_least: float | None, above: float | None, at_most: float | None) -> None:
    if isinstance(value, str):
        return
    if not float("-inf") < value < float("inf"):
        raise ConfigError(f"{key} is {value}, expected a finite number")
    if at_least is not None and value < at_least:
        raise ConfigError(f"{key} is {value}, expected at least {at_least:g}")
    if above is not None and value <= above:
        raise ConfigError(f"{key} is {value}, expected more than {above:g}")
    if at_most is not None and value > at_most:
        raise ConfigError(f"{key} is {value}, expected at most {at_most:g}")
