"""What the merging commands read: networks by name, weights from files, images from folders."""

from __future__ import annotations

import pickle
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from c2m3_fl.errors import ConfigError, DataError, ParamsError

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which torchvision's weights expect
_BATCH = 50  # images per batch


def load_network(name: str, classes: int = 0) -> nn.Module:
    """The architecture that ``torchvision:NAME`` or ``package.module:factory`` names.

    Raises
    ------
    ConfigError
        When there is no such network.
    """
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(f"model is {name!r}, expected torchvision:NAME or package.module:factory")
    if module == "torchvision":
        import torchvision

        if attribute not in torchvision.models.list_models(module=torchvision.models):
            raise ConfigError(f"torchvision has no classifier {attribute!r}")
        options: dict[str, Any] = {"num_classes": classes} if classes else {}
        network: nn.Module = torchvision.models.get_model(attribute, weights=None, **options)
        return network
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model {name!r} cannot be loaded: {error}") from error
    finally:
        sys.path.pop(0)
    made = made[0] if isinstance(made, tuple) else made
    if not isinstance(made, nn.Module):
        raise ConfigError(f"model {name!r} returned a {type(made).__name__}, expected a torch.nn.Module")
    return made


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
        raise DataError(f"{file} is no file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise DataError(f"{file} is no safetensors file: {error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DataError(
            f"{file} was refused: torch.load(weights_only=True) cannot read it, so it may run code when it is opened; "
            "save the state dict with safetensors"
        ) from error
    found = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ParamsError(f"{file} holds no state dict: expected tensors by name")
    return found


def load_images(folder: Path, size: int) -> list[tuple[Tensor, ...]]:
    """Batches of images, with labels where they lie in one subfolder per class (numbered in alphabetical order).

    Raises
    ------
    DataError
        When the folder holds no image, or one that cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    classes = sorted(each for each in folder.iterdir() if each.is_dir())
    files = [(file, index) for index, each in enumerate(classes) for file in sorted(each.rglob("*")) if _is_image(file)]
    labelled = bool(files)
    files = files or [(file, -1) for file in sorted(folder.iterdir()) if _is_image(file)]
    if not files:
        raise DataError(f"{folder} holds no image ({', '.join(sorted(_IMAGES))}), neither itself nor in its subfolders")
    batches: list[tuple[Tensor, ...]] = []
    for first in range(0, len(files), _BATCH):
        part = files[first : first + _BATCH]
        inputs = torch.stack([_read(file, size) for file, _ in part])
        batches.append((inputs, torch.tensor([label for _, label in part])) if labelled else (inputs,))
    return batches


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _IMAGES


def _read(file: Path, size: int) -> Tensor:
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error
    scaled = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    return (scaled - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
