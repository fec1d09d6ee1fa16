"""The networks and images of the gallery: three small CNNs, each trained on scikit-learn's digits from its own seed.

    python -m tests.benchmarks.merging_gallery FOLDER

writes ``FOLDER/{0,1,2}.safetensors`` and ``FOLDER/{calibration,test}/CLASS/NUMBER.png`` in less than a minute, and
prints the commands that draw the pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

from c2m3_fl.cli.images import load_images
from simulations.data import Images
from simulations.models import cnn
from simulations.settings import Settings
from simulations.training import train

_SIDE = 8
_SPLITS = {"train": slice(0, 1200), "calibration": slice(1200, 1400), "test": slice(1400, None)}
_SETTINGS = Settings(local_epochs=10, optimiser="adam", learning_rate=1e-3)


def network() -> nn.Module:
    """The architecture: two convolutions and a hidden layer."""
    return cnn((3, _SIDE, _SIDE), [32, 64], 128, 10)


def write_images(folder: Path) -> None:
    """The digits as PNG files, one folder per split and class."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    for split, rows in _SPLITS.items():
        for row in order[rows]:
            file = folder / split / str(digits.target[row]) / f"{row}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[row] / 16 * 255).astype(np.uint8)).save(file)


def main() -> None:
    """Write images and weights; print what to do with them."""
    parser = argparse.ArgumentParser(description="Networks and images of the gallery.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_images(folder)
    batches = load_images(folder / "train", _SIDE)
    images = Images(torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches]))
    for seed in range(3):
        torch.manual_seed(seed)
        model = network()
        train(model, images, _SETTINGS, seed)
        save_file(model.state_dict(), folder / f"{seed}.safetensors")
    options = f"--model {__spec__.name}:network --image-size {_SIDE}"
    files = [str(folder / f"{seed}.safetensors") for seed in range(3)]
    print(f"c2m3-fl landscape {' '.join(files)} {options} --data {folder}/test -o {folder}/landscape.png")
    print(f"c2m3-fl barrier {' '.join(files[:2])} {options} --data {folder}/test -o {folder}/barrier.png")
    print(
        f"c2m3-fl merge {' '.join(files)} {options} --calibration {folder}/calibration -o {folder}/merged.safetensors "
        f"--picture {folder}/agreement.png"
    )


if __name__ == "__main__":
    main()
