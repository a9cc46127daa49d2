"""Files of a run: models and checkpoints that are there complete or not at all."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedConfig

from hf_querydet.configuration_utils import DetectorConfig
from hf_querydet.file_writing import (
    PARTIAL_SUFFIX,
    PREVIOUS_SUFFIX,
    finish_directory,
    write_json,
)
from hf_querydet.image_processing_utils import DetectionImageProcessor

CHECKPOINTS = "checkpoints"
FACTS = "facts.json"
# Of a backbone's configuration.
BACKBONE_FACTS = ("model_type", "backbone", "out_indices", "output_stride")
# Fields that a run may go on with when they change, by their endings.
CHANGEABLE_FIELDS = (
    *("dropout", "_cost", "_coefficient", "focal_alpha"),
    *("auxiliary_loss", "use_pretrained_backbone"),
)
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
        FileExistsError: If there are models or checkpoints of another run.
        OSError: If nothing can be written there.
    """
    directory = Path(directory)
    _try_to_write(directory)
    checkpoints = list_checkpoints(directory / CHECKPOINTS)
    if not resume:
        if checkpoints:
            raise FileExistsError(
                f"--output-dir {directory} holds a run already; continue it with --resume, or "
                "choose another directory."
            )
        models = [name for name in ("best", "last") if (directory / name).exists()]
        if models:
            raise FileExistsError(
                f"--output-dir {directory} holds {' and '.join(models)} of another run, which "
                "would be replaced; choose another directory."
            )
        return None
    for previous in directory.glob("*" + PREVIOUS_SUFFIX):
        model = directory / previous.name.removesuffix(PREVIOUS_SUFFIX)
        with suppress(FileNotFoundError):  # another process of this run was faster
            if not model.exists():
                previous.rename(model)
    return checkpoints[-1] if checkpoints else None


def _try_to_write(directory: Path) -> None:
    """Raise if a directory cannot be made or written; nothing is left of the attempt."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise OSError(
            f"--output-dir {directory} cannot be written ({error}); choose another directory."
        ) from error


def save_checkpoint(
    accelerator: Accelerator, directory: str | os.PathLike, step: int, facts: Mapping[str, Any]
) -> None:
    """Save all that resuming needs; the checkpoint gets its name when it is complete.

    Every process must call this. The newest two checkpoints are kept: should the machine die while
    the last one reaches the disk, there is the one before.

    Args:
        accelerator: Holds model, optimizer and what else is registered for checkpoints.
        directory: Of the run.
        step: Optimizer steps done, for the name.
        facts: What a run that continues it must agree with, see :func:`check_facts`; plain values.
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
        write_json(partial / FACTS, facts)
        finish_directory(partial, finished)
        for old in list_checkpoints(directory)[:-NUM_CHECKPOINTS_KEPT]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def run_facts(
    config: DetectorConfig, processor: DetectionImageProcessor, held_out: Any = None
) -> dict[str, Any]:
    """What :func:`save_checkpoint` keeps of a run and :func:`check_facts` compares.

    All that decides what the weights mean: variant, labels, picture size, and fields of the
    configuration. Dropout, and what belongs to the loss, may change in the middle of a run.

    Args:
        config: Of the model.
        processor: Its image processor.
        held_out: Which part of the training split is evaluated on, plain values; None if none is.
    """
    values = config.to_dict()
    backbone = values["backbone_config"]
    of_transformers = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    of_detectors = {field.name for field in dataclasses.fields(config)} - of_transformers
    return {
        "variant": config.model_type,
        "labels": [config.id2label[label] for label in range(config.num_labels)],
        "held-out part": held_out,
        "picture size": {name: edge for name, edge in dict(processor.size).items() if edge},
        "backbone": {name: backbone.get(name) for name in BACKBONE_FACTS},
        **{
            name: values[name]
            for name in sorted(of_detectors - {"backbone_config"})
            if not name.endswith(CHANGEABLE_FIELDS)
        },
    }


def check_facts(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a run that this one does not continue.

    Weights of the same shapes would be loaded all the same: those of a class under the name of
    another.

    Args:
        checkpoint: As :func:`open_run_directory` returns it.
        facts: Of this run, as :func:`save_checkpoint` got those of the other.

    Raises:
        ValueError: If one of them was something else when the checkpoint was made.
    """
    saved = json.loads((checkpoint / FACTS).read_text(encoding="utf-8"))
    for name, value in facts.items():
        if saved.get(name) != json.loads(json.dumps(value)):
            raise ValueError(
                f"{name} of {checkpoint}: {saved.get(name)}, now: {value}. Resume with the model, "
                "labels, picture size and held-out pictures of before, or begin a new run in "
                "another --output-dir."
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
    accelerator.wait_for_everyone()  # others may be loading it yet
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
