"""Folders of images, as batches for the merging commands."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from c2m3_fl.cli.limits import check_memory
from c2m3_fl.errors import ConfigError, DataError
from c2m3_fl.network.calibration import ExampleInputs

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which torchvision's weights expect
_MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels
_SIDE = 224  # pixels of ImageNet's images
_BATCH = 50  # images per batch
_BYTES = 4  # per pixel and channel
_LARGEST_CLASS = 999_999


def channels_of(example: ExampleInputs | None) -> int:
    """Channels of the images that a network takes, by the example inputs of its factory; by default three."""
    return example.shape[1] if isinstance(example, Tensor) and example.ndim == 4 else 3


def size_of(example: ExampleInputs | None, asked: int | None) -> int:
    """Side of the images that a network takes: as asked, or that of the example inputs of its factory, or 224."""
    if asked is not None:
        return asked
    return example.shape[-1] if isinstance(example, Tensor) and example.ndim == 4 else _SIDE


def load_images(folder: Path, size: int, *, channels: int = 3, raw: bool = False) -> list[tuple[Tensor, ...]]:
    """Batches of images, with labels if there is one subfolder per class.

    If all subfolders have numbers as names, these are the classes; otherwise classes follow the alphabetical order.

    Parameters
    ----------
    folder : Path
        Folder of the images.
    size : int
        Pixels of each side, to which they are resized.
    channels : {1, 3}
        Grey or RGB.
    raw : bool
        Leave the pixels in [0, 1] instead of scaling them by ImageNet's mean and spread.

    Raises
    ------
    ConfigError
        For any other number of channels.
    DataError
        When the folder holds no image, or one that cannot be read.
    """
    if channels not in _MODES:
        raise ConfigError(f"the network takes images of {channels} channels, a folder of images gives 1 or 3")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    classes = sorted(each for each in folder.iterdir() if each.is_dir())
    numbered = all(each.name.isdecimal() for each in classes)
    labels = {each: int(each.name) if numbered else index for index, each in enumerate(classes)}
    for each, label in labels.items():
        if label > _LARGEST_CLASS:
            raise DataError(f"{folder} has a class {each.name}, expected numbers up to {_LARGEST_CLASS}")
    files = [(file, labels[each]) for each in classes for file in sorted(each.rglob("*")) if _is_image(file)]
    labelled = bool(files)
    files = files or [(file, -1) for file in sorted(folder.iterdir()) if _is_image(file)]
    if not files:
        raise DataError(f"{folder} holds no image ({', '.join(sorted(_IMAGES))}), neither itself nor in its subfolders")
    check_memory(_BYTES * len(files) * channels * size**2, f"{len(files)} images of {size} x {size} pixels")
    batches: list[tuple[Tensor, ...]] = []
    for first in range(0, len(files), _BATCH):
        part = files[first : first + _BATCH]
        inputs = torch.stack([_read(file, size, channels, raw) for file, _ in part])
        batches.append((inputs, torch.tensor([label for _, label in part])) if labelled else (inputs,))
    return batches


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _IMAGES


def _read(file: Path, size: int, channels: int, raw: bool) -> Tensor:
    import numpy as np
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                resized = image.convert(_MODES[channels]).resize((size, size), Image.Resampling.BILINEAR)
        pixels = np.asarray(resized, dtype=np.float32).reshape(size, size, channels)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{file} has too many pixels, expected at most {Image.MAX_IMAGE_PIXELS:,}; scale it") from error
    except Exception as error:  # a broken file fails in many ways
        raise DataError(f"{file} cannot be read as an image: {type(error).__name__}: {error}") from error
    scaled = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    if raw:
        return scaled
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (_MEAN, _STD))
    return (scaled - mean) / std if channels == 3 else (scaled - mean.mean()) / std.mean()
