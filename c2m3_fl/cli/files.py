"""Input of the merging commands: networks by name, weights from files, images from folders."""

from __future__ import annotations

import difflib
import sys
import warnings
import zipfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from c2m3_fl.errors import ConfigError, DataError, ParamsError
from c2m3_fl.merging.recalibrate.setting import check_params
from c2m3_fl.network.calibration import ExampleInputs
from c2m3_fl.network.copying import own_names


def load_network(name: str, classes: int = 0, width: float | None = None) -> tuple[nn.Module, ExampleInputs | None]:
    """The architecture of that name, and the example inputs that its factory returns with it.

    Parameters
    ----------
    name : str
        A torchvision classifier, ``NAME`` or ``torchvision:NAME``, or ``package.module:factory``. A factory returns a
        module, or a module and example inputs.
    classes : int
        Width of a torchvision network's output; 0 keeps its own.
    width : float, optional
        What the factory is called with, as an int if it is whole; by default nothing.

    Raises
    ------
    ConfigError
        When there is no such network.
    """
    module, _, attribute = name.rpartition(":")
    if module in ("", "torchvision"):
        if width is not None:
            raise ConfigError(f"{name!r} has one width; networks of several widths are named package.module:factory")
        return build_classifier(attribute, classes), None
    made = call_factory(name, *(() if width is None else (int(width) if width == int(width) else width,)))
    network, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{name!r} returned {type(network).__name__}; expected a module, or (module, example inputs)")
    return network, example


def call_factory(name: str, *arguments: float) -> Any:  # noqa: ANN401  # whatever it returns
    """The result of ``package.module:factory``, called with these arguments, if any.

    Raises
    ------
    ConfigError
        When there is no such function, or it fails.
    """
    module, _, attribute = name.rpartition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(import_module(module), attribute)(*arguments)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cannot load {name!r}: {error}; expected package.module:factory") from error
    except (Exception, SystemExit) as error:  # a factory may raise anything, and a script may end itself
        wanted = f"with the width, {arguments[0]}" if arguments else "without arguments"
        raise ConfigError(
            f"{name!r} failed: {type(error).__name__}: {error}; expected a factory that is called {wanted}"
        ) from error
    finally:
        sys.path.pop(0)


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
        with warnings.catch_warnings(action="ignore"):  # of torch, on kinds of tensors that are refused below
            _check_size(file)
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except DataError:
        raise
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
    named = isinstance(found, dict) and all(isinstance(name, str) for name in found)
    if not named or not all(isinstance(value, Tensor) for value in found.values()):
        raise ParamsError(f"{file} holds no state dict: expected tensors by name")
    for name, value in found.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            kind = "quantized" if value.is_quantized else "without content" if value.is_meta else f"{value.layout}"
            raise ParamsError(f"{file}: {name!r} is {kind}, expected a dense tensor; save it as one")
    return dict(found)


def _check_size(file: Path) -> None:
    """Raise `DataError` for a torch file whose tensors take more memory than it has bytes: torch never compresses."""
    held = file.stat().st_size
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(each.file_size for each in archive.infolist())
        if unpacked > held:
            raise DataError(
                f"{file} unpacks to {unpacked:,} bytes from {held:,}, expected an archive that is not compressed, as "
                "torch.save writes it; save the state dict again"
            )
        return
    with (
        FakeTensorMode()
    ):  # the format before torch 1.6, whose sizes precede the elements: nothing is read or allocated
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    storages = [each.untyped_storage() for each in tree_leaves(loaded) if isinstance(each, Tensor)]
    claimed = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
    if claimed > held:
        raise DataError(
            f"{file} says that its tensors take {claimed:,} bytes, and has {held:,}: it is damaged; save it again"
        )


def load_nodes(network: nn.Module, files: Sequence[Path]) -> list[dict[str, Tensor]]:
    """The state dicts of several files, each of which must fit the network: see `load_params` and `check_params`."""
    nodes: list[dict[str, Tensor]] = [own_names(network, load_params(file)) for file in files]
    for file, node in zip(files, nodes, strict=True):
        check_params(network, node, str(file))
    return nodes
