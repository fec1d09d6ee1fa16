"""Input of the merging commands: networks by name, weights from files, images from folders."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from c2m3_fl.errors import ConfigError, DataError, ParamsError
from c2m3_fl.merging.recalibrate.setting import check_params
from c2m3_fl.network.calibration import ExampleInputs

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which torchvision's weights expect
_MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels
_SIDE = 224  # pixels of ImageNet's images
_BATCH = 50  # images per batch
PICTURES = (".png", ".pdf", ".svg", ".jpg")


def load_network(name: str, classes: int = 0) -> tuple[nn.Module, ExampleInputs | None]:
    """The architecture of that name, and the example inputs that its factory returns with it.

    Parameters
    ----------
    name : str
        A torchvision classifier, ``NAME`` or ``torchvision:NAME``, or ``package.module:factory``. A factory returns a
        module, or a module and example inputs.
    classes : int
        Width of a torchvision network's output; 0 keeps its own.

    Raises
    ------
    ConfigError
        When there is no such network.
    """
    module, _, attribute = name.rpartition(":")
    if module in ("", "torchvision"):
        return build_classifier(attribute, classes), None
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cannot load {name!r}: {error}; expected package.module:factory") from error
    except Exception as error:  # a factory may raise anything
        raise ConfigError(
            f"{name!r} failed: {type(error).__name__}: {error}; expected a factory that is called without arguments"
        ) from error
    finally:
        sys.path.pop(0)
    network, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{name!r} returned {type(network).__name__}; expected a module, or (module, example inputs)")
    return network, example


def classifiers() -> list[str]:
    """Names of all torchvision classifiers."""
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def build_classifier(name: str, classes: int = 0) -> nn.Module:
    """A torchvision classifier with random weights; `classes` other than 0 set the width of its output.

    Raises
    ------
    ConfigError
        When there is none of that name.
    """
    import torchvision

    if name not in classifiers():
        alike = difflib.get_close_matches(name, classifiers()) or classifiers()
        raise ConfigError(
            f"{name!r} is not a torchvision classifier such as {', '.join(alike)}; "
            "a network of your own is named package.module:factory"
        )
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    options |= {"num_classes": classes} if classes else {}
    network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return network


def load_params(file: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file, or from a torch file that holds tensors and nothing else.

    Raises
    ------
    DataError
        When there is no such file or it cannot be read.
    ParamsError
        When it holds anything but named tensors.
    """
    if not file.is_file():
        raise DataError(f"{file} is not a file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise DataError(f"{file} is not a safetensors file: {error}") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    except Exception as error:  # a file of another format fails in many ways
        raise DataError(
            f"{file} was refused: torch.load(weights_only=True) cannot read it, so loading it could run code; "
            "save the state dict with safetensors"
        ) from error
    found = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ParamsError(f"{file} holds no state dict: expected tensors by name")
    return found


def load_nodes(network: nn.Module, files: Sequence[Path]) -> list[dict[str, Tensor]]:
    """The state dicts of several files, each of which must fit the network: see `load_params` and `check_params`."""
    nodes = [load_params(file) for file in files]
    for file, node in zip(files, nodes, strict=True):
        check_params(network, node, str(file))
    return nodes


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
    files = [(file, labels[each]) for each in classes for file in sorted(each.rglob("*")) if _is_image(file)]
    labelled = bool(files)
    files = files or [(file, -1) for file in sorted(folder.iterdir()) if _is_image(file)]
    if not files:
        raise DataError(f"{folder} holds no image ({', '.join(sorted(_IMAGES))}), neither itself nor in its subfolders")
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
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            resized = image.convert(_MODES[channels]).resize((size, size), Image.Resampling.BILINEAR)
            pixels = np.asarray(resized, dtype=np.float32).reshape(size, size, channels)
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error
    scaled = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    if raw:
        return scaled
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (_MEAN, _STD))
    return (scaled - mean) / std if channels == 3 else (scaled - mean.mean()) / std.mean()


def check_output(file: Path, suffixes: Sequence[str]) -> None:
    """Raise `ConfigError`, before any work is done, if the result could not be written to `file`."""
    if file.suffix.lower() not in suffixes:
        raise ConfigError(f"{file} ends in {file.suffix!r}, expected {' or '.join(suffixes)}")
    if not file.parent.is_dir():
        raise ConfigError(f"{file} cannot be written: {file.parent} is not a folder")
