"""Reads checkpoints that ``torch.save`` has written, without running anything that is in them."""

import argparse
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_querydet.checkpoint_mapping_utils import AuthorsTensors, CheckpointError

# How files of torch.save begin: an archive, and before version 1.6 a pickle of a certain number.
ARCHIVE_START = b"PK\x03\x04"
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Where the authors' programs put the model, beside optimizer and settings.
MODEL_KEYS = ("model", "state_dict")
# From wrapping a model for several GPUs.
WRAPPER_PREFIX = "module."

# Beside tensors, numbers, strings and containers: the settings of a training script, and numpy's
# arrays and numbers. None of them runs code of the file.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_SCALAR = np.float64(0).__reduce__()[0]
SAFE_GLOBALS = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *(
        type(np.dtype(name))
        for name in ("bool", "int8", "uint8", "int16", "int32", "int64", "f2", "f4", "f8")
    ),
    # numpy 2 has moved them; files name the place that they were at.
    *(
        (function, f"{package}.multiarray.{function.__name__}")
        for function in (_RECONSTRUCT, _SCALAR)
        for package in ("numpy.core", "numpy._core")
    ),
]


@dataclass(frozen=True)
class Checkpoint:
    """What is in a file.

    Attributes:
        tensors: Of the model, without a wrapper's prefix.
        arguments: Options of the training script, empty if the file has none.
    """

    tensors: AuthorsTensors
    arguments: Mapping[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint of a detector's authors.

    The file is a state dictionary, or a dictionary that holds one as ``model`` or ``state_dict``;
    ``args`` beside it (an ``argparse.Namespace``) are the options it was trained with. Whatever
    else is there, an optimizer for instance, is passed over.

    Args:
        path: File of ``torch.save``.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, no such file, holds objects that would have to be
            trusted, or no model.
    """
    content = _unpickle(Path(path))
    arguments: Any = {}
    state = content
    if isinstance(content, Mapping):
        arguments = content.get("args", {})
        state = next((content[key] for key in MODEL_KEYS if key in content), content)
    tensors = _tensors(state, path)
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    return Checkpoint(tensors, arguments if isinstance(arguments, Mapping) else {})


def _unpickle(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    with path.open("rb") as file:
        start = file.read(len(LEGACY_START))
    if not start.startswith((ARCHIVE_START, LEGACY_START)):
        raise CheckpointError(
            f"{path} is not a checkpoint: torch.save writes files that begin otherwise. "
            "(A page that a server sent in place of the file looks like this.)"
        )
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        # Only torch's message tells what it has refused.
        refused = re.search(r"\bGLOBAL ([\w.]+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} holds {refused[1]}, and reading that may run code of the file. Only "
                "tensors, numbers and the settings of a training script are read. If you trust the "
                "file, write one with the model alone:\n"
                "  import torch\n"
                f"  checkpoint = torch.load({str(path)!r}, weights_only=False)\n"
                "  torch.save({'model': checkpoint['model']}, 'model_only.pth')"
            ) from error
        raise CheckpointError(
            f"{path} is damaged or was cut off ({type(error).__name__}); get it again. It has "
            f"{path.stat().st_size:,} bytes."
        ) from error


def _tensors(state: Any, path: str | os.PathLike) -> AuthorsTensors:
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path} holds no model, but {_described(state)}.")
    state = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in state.items()
    }
    others = {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}
    if others:
        name, value = next(iter(others.items()))
        raise CheckpointError(
            f"{path} holds no model: a dictionary of tensors, on its own or as 'model', was "
            f"expected, but {name!r} is {_described(value)}."
        )
    if all(name.startswith(WRAPPER_PREFIX) for name in state):
        state = {name.removeprefix(WRAPPER_PREFIX): value for name, value in state.items()}
    return AuthorsTensors(state)


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        keys = ", ".join(repr(key) for key in list(value)[:8])
        return f"a dictionary with {keys or 'nothing in it'}"
    return f"an object of type {type(value).__name__}"
