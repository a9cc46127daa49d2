"""Files of a run: models and checkpoints that are there complete or not at all."""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_querydet.file_writing import (
    PARTIAL_SUFFIX,
    PREVIOUS_SUFFIX,
    finish_directory,
    write_json,
)

CHECKPOINTS = "checkpoints"
MODEL_OF_CHECKPOINT = "model.json"
NUM_CHECKPOINTS_KEPT = 2


def open_run_directory(directory: str | os.PathLike, *, resume: bool) -> Path | None:
    """Find out where a run starts, before anything is written.

    A model whose replacement was interrupted between two renames is put back.

    Args:
        directory: Of the run, existing or not.
        resume: Whether it continues what is there.

    Returns:
        The newest complete checkpoint; None to start from the beginning.

    Raises:
        FileExistsError: If there are checkpoints, which a new run would mix with its own.
    """
    directory = Path(directory)
    checkpoints = list_checkpoints(directory / CHECKPOINTS)
    if not resume:
        if checkpoints:
            raise FileExistsError(
                f"--output-dir {directory} holds a run already; continue it with --resume, or "
                "choose another directory."
            )
        return None
    for previous in directory.glob("*" + PREVIOUS_SUFFIX):
        model = directory / previous.name.removesuffix(PREVIOUS_SUFFIX)
        with suppress(FileNotFoundError):  # another process of this run was faster
            if not model.exists():
                previous.rename(model)
    return checkpoints[-1] if checkpoints else None


def save_checkpoint(
    accelerator: Accelerator, directory: str | os.PathLike, step: int, model: Mapping[str, Any]
) -> None:
    """Save all that resuming needs; the checkpoint gets its name when it is complete.

    Every process must call this. The newest two checkpoints are kept: should the machine die while
    the last one reaches the disk, there is the one before.

    Args:
        accelerator: Holds model, optimizer and what else is registered for checkpoints.
        directory: Of the run.
        step: Optimizer steps done, for the name.
        model: What the weights belong to, see :func:`check_model_of`; plain values.
    """
    directory = Path(directory) / CHECKPOINTS
    finished = directory / checkpoint_name(step)
    partial = finished.with_name(finished.name + PARTIAL_SUFFIX)
    if accelerator.is_main_process:
        for leftover in directory.glob("*" + PARTIAL_SUFFIX):  # of a run that was killed
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    accelerator.save_state(partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(partial / MODEL_OF_CHECKPOINT, model)
        finish_directory(partial, finished)
        for old in list_checkpoints(directory)[:-NUM_CHECKPOINTS_KEPT]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def check_model_of(checkpoint: Path, model: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights belong to something else.

    Weights of the same shapes would be loaded all the same: those of a class under the name of
    another.

    Args:
        checkpoint: As :func:`open_run_directory` returns it.
        model: What the weights must belong to, as :func:`save_checkpoint` got it.

    Raises:
        ValueError: If it was something else when the checkpoint was made.
    """
    saved = json.loads((checkpoint / MODEL_OF_CHECKPOINT).read_text(encoding="utf-8"))
    for name, value in model.items():
        if saved[name] != value:
            raise ValueError(
                f"The {name} of {checkpoint} are {saved[name]}, now they are {value}. Resume with "
                "the model and the labels of before, or begin a new run in another --output-dir."
            )


def rename_checkpoint(accelerator: Accelerator, checkpoint: Path, step: int) -> None:
    """Let a run whose steps are counted anew go on from a checkpoint.

    Checkpoints are told apart by their steps, so that those of the old count would be taken for
    newer ones: the one that is continued gets its new number, the others are deleted. Every process
    must call this.

    Args:
        accelerator: That has loaded ``checkpoint``.
        checkpoint: As :func:`open_run_directory` returns it.
        step: Of the new count, for the name.
    """
    name = checkpoint_name(step)
    if name != checkpoint.name and accelerator.is_main_process:
        for other in list_checkpoints(checkpoint.parent):
            if other != checkpoint:
                shutil.rmtree(other)
        checkpoint.rename(checkpoint.with_name(name))
    accelerator.wait_for_everyone()


def checkpoint_name(step: int) -> str:
    """Directory name of a checkpoint; names sort by step."""
    return f"step_{step:08d}"


def list_checkpoints(directory: str | os.PathLike) -> list[Path]:
    """Complete checkpoints below a directory, oldest first."""
    found = Path(directory).glob("step_*")
    return sorted(path for path in found if path.suffix != PARTIAL_SUFFIX)
