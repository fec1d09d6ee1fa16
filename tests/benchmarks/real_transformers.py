"""Transformers that are merged: a ViT on CIFAR-10 and a GPT on Shakespeare, trained from seeds of their own.

Data stay on the device as integers; every trained network is kept in a folder and read from there the next time.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from simulations.language_models import Gpt
from simulations.sources import KINDS, open_source
from simulations.text import ALPHABET
from simulations.vit import Vit

_PAD = 4  # pixels that a crop may move an image by
_EVALUATED = 500  # inputs of one step of the evaluation


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy and accuracy on the test split."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Recipe:
    """How networks are trained: AdamW with one cycle of the learning rate."""

    steps: int
    batch: int
    rate: float
    decay: float
    width: int


class Predictor(Gpt):
    """The GPT of the simulations, with scores (n, length, classes) of the character after each one of a window."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of every next character."""
        scores: Tensor = self.head(self.states(tokens))
        return scores


class Task(ABC):
    """A data set on a device, and the network that is trained on it.

    Attributes
    ----------
    title : str
        What tables call it.
    device : torch.device
        Where the data are, and networks are trained and scored.
    calibration : list of Tensor
        Unlabelled training inputs.
    """

    recipe: Recipe
    title: str
    device: torch.device
    calibration: list[Tensor]

    @abstractmethod
    def build(self) -> nn.Module:
        """A network at its initial weights, on the CPU."""

    @abstractmethod
    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one step of training."""

    @abstractmethod
    def tested(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the test split."""

    def train(self, seed: int) -> dict[str, Tensor]:
        """Train a network; the seed decides initialisation and batches."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build().train().to(self.device)
        generator = torch.Generator().manual_seed(seed)
        rate, steps = self.recipe.rate, self.recipe.steps
        optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=self.recipe.decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        for _ in range(steps):
            inputs, targets = self.batch(generator)
            optimiser.zero_grad()
            _loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimiser.step()
            schedule.step()
        torch.set_float32_matmul_precision(precision)
        return {name: value.cpu() for name, value in model.state_dict().items()}

    def trained(self, seed: int, folder: Path) -> dict[str, Tensor]:
        """A network that `train` trained now or earlier."""
        recipe = "-".join(f"{value:g}" for value in vars(self.recipe).values())
        file = folder / f"{type(self).__name__.lower()}-{recipe}-{seed}.pt"
        if not file.exists():
            _save(self.train(seed), file)
        found: dict[str, Tensor] = torch.load(file)
        return found

    def score(self, params: Mapping[str, Tensor]) -> Score:
        """Loss and accuracy of a network on the test split, where the data are."""
        model = self.build().eval().to(self.device)
        model.load_state_dict(params)
        loss, right, count = 0.0, 0, 0
        with torch.no_grad():
            for inputs, targets in self.tested():
                scores = model(inputs).flatten(0, -2)
                loss += float(nn.functional.cross_entropy(scores, targets.flatten(), reduction="sum"))
                right += int((scores.argmax(1) == targets.flatten()).sum())
                count += targets.numel()
        return Score(loss / count, right / count)


def _loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all places."""
    return nn.functional.cross_entropy(scores.flatten(0, -2), targets.flatten())


def _save(value: object, file: Path) -> None:
    """Write a file in one go: other processes may look for it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    torch.save(value, part)
    part.rename(file)


class Images(Task):
    """CIFAR-10, flipped and cropped at random.

    Parameters
    ----------
    device : torch.device
        Where the images stay.
    recipe : Recipe
        How networks are trained.
    folder : Path
        Decoded images are kept here.
    size : int
        Images of either split; 0 takes all.
    """

    def __init__(self, device: torch.device, recipe: Recipe, folder: Path, size: int = 0) -> None:
        self.recipe, self.device = recipe, device
        self.title = f"ViT, CIFAR-10 (width {recipe.width}, 4 blocks)"
        self.inputs, self.labels = _decoded("train", folder, size, device)
        self.test_inputs, self.test_labels = _decoded("test", folder, size, device)
        kind = KINDS["cifar10"]
        self._mean, self._std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (kind.mean, kind.std))
        self._padded = nn.functional.pad(self.inputs, [_PAD] * 4)
        self.calibration = list(torch.split(self._scaled(self.inputs[:500]), 100))

    def build(self) -> nn.Module:
        """A ViT with patches of 4."""
        return Vit((3, 32, 32), self.recipe.width, 10)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images that are drawn, moved by up to 4 pixels, and flipped."""
        count, device = self.recipe.batch, self.inputs.device
        rows = torch.randint(len(self.inputs), (count,), generator=generator).to(device)
        offsets = torch.randint(2 * _PAD + 1, (2, count, 1), generator=generator).to(device)
        flipped = torch.randint(2, (count, 1), generator=generator, dtype=torch.bool).to(device)
        side = torch.arange(32, device=device)
        down, right = offsets[0] + side, offsets[1] + torch.where(flipped, 31 - side, side)
        images = self._padded[
            rows[:, None, None, None],
            torch.arange(3, device=device)[:, None, None],
            down[:, None, :, None],
            right[:, None, None],
        ]
        return self._scaled(images), self.labels[rows]

    def tested(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images."""
        for inputs, labels in zip(
            torch.split(self.test_inputs, _EVALUATED), torch.split(self.test_labels, _EVALUATED), strict=True
        ):
            yield self._scaled(inputs), labels

    def _scaled(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self._mean) / self._std


def _decoded(split: str, folder: Path, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The images of a split, uint8 of shape (n, 3, 32, 32), and their labels."""
    source, file = open_source("cifar10", split), folder / f"cifar10-{split}.pt"
    labels = torch.from_numpy(source.labels)
    chosen = range(size or len(labels))
    if size or not file.exists():
        images = torch.from_numpy(source.raw(torch.tensor(chosen).numpy())).permute(0, 3, 1, 2).contiguous()
        if not size:
            _save(images, file)
    else:
        images = torch.load(file)
    return images.to(device), labels[: len(images)].to(device)


class Characters(Task):
    """Shakespeare's plays: the first nine tenths for training, the rest for the test.

    Parameters
    ----------
    device : torch.device
        Where the text stays.
    recipe : Recipe
        How networks are trained.
    folder : Path
        That of the data, which holds ``shakespeare/input.txt``.
    length : int
        Characters of a window.
    """

    def __init__(self, device: torch.device, recipe: Recipe, folder: Path, length: int = 64) -> None:
        self.recipe, self.device = recipe, device
        self.title = f"GPT, Shakespeare (width {recipe.width}, 4 blocks)"
        self._length = length
        places = {character: place for place, character in enumerate(ALPHABET)}
        text = (folder / "shakespeare" / "input.txt").read_text(encoding="utf-8")
        tokens = torch.tensor([places[character] for character in text], device=device)
        first = round(0.9 * len(tokens))
        self._train, self._test = tokens[:first], tokens[first:]
        starts = torch.arange(250, device=device)[:, None] * (first // 250 - length)
        self.calibration = list(torch.split(self._train[starts + torch.arange(length, device=device)], 50))

    def build(self) -> nn.Module:
        """A GPT."""
        return Predictor(self.recipe.width, len(ALPHABET), self._length)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Windows that are drawn."""
        starts = torch.randint(len(self._train) - self._length, (self.recipe.batch, 1), generator=generator)
        rows = starts.to(self._train.device) + torch.arange(self._length, device=self._train.device)
        return self._train[rows], self._train[rows + 1]

    def tested(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows one after the other."""
        count = (len(self._test) - 1) // self._length * self._length
        windows = self._test[:count].view(-1, self._length), self._test[1 : count + 1].view(-1, self._length)
        yield from zip(*(torch.split(each, _EVALUATED) for each in windows), strict=True)


RECIPES = {
    "vit": Recipe(steps=2000, batch=512, rate=1.5e-3, decay=0.1, width=96),
    "gpt": Recipe(steps=2000, batch=128, rate=1.5e-3, decay=0.1, width=128),
}
