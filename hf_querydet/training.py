"""What the training script and Trainer share: parameter groups, schedule, run directory."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hf_querydet.recipe_utils import Recipe

PARTIAL_SUFFIX = ".partial"


def parameter_groups(
    model: nn.Module,
    recipe: Recipe,
    *,
    learning_rate: float | None = None,
    backbone_learning_rate_factor: float | None = None,
) -> list[dict[str, Any]]:
    """Parameters of an optimizer, grouped by learning rate as in the paper.

    Args:
        model: A detector. Frozen parameters are left out.
        recipe: Settings of its variant.
        learning_rate: Of most parameters; the recipe's if not given.
        backbone_learning_rate_factor: On the learning rate of the backbone; the recipe's if not
            given, which is meant for pretrained weights. Pass 1 for a backbone that starts random.

    Returns:
        Groups with ``name``, ``params`` and ``lr``: ``main``, ``backbone`` and, where the recipe
        has them, ``slow``. Groups without parameters are left out.
    """
    if learning_rate is None:
        learning_rate = recipe.learning_rate
    if backbone_learning_rate_factor is None:
        backbone_learning_rate_factor = recipe.backbone_learning_rate_factor
    groups: dict[str, list[nn.Parameter]] = {"main": [], "backbone": [], "slow": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "backbone" in name.split("."):
            groups["backbone"].append(parameter)
        elif any(part in name for part in recipe.slow_parameters):
            groups["slow"].append(parameter)
        else:
            groups["main"].append(parameter)
    factors = {
        "main": 1.0,
        "backbone": backbone_learning_rate_factor,
        "slow": recipe.slow_learning_rate_factor,
    }
    return [
        {"name": name, "params": parameters, "lr": learning_rate * factors[name]}
        for name, parameters in groups.items()
        if parameters
    ]


def learning_rate_schedule(
    optimizer: Optimizer,
    *,
    schedule: str,
    num_steps: int,
    warmup_steps: int = 0,
    step_fraction: float = 0.8,
) -> LambdaLR:
    """Linear warm-up, then one drop to a tenth or half a cosine down to zero.

    Args:
        optimizer: Its learning rates are the peak.
        schedule: ``"step"`` (the papers') or ``"cosine"``.
        num_steps: Optimizer steps of the whole run.
        warmup_steps: Steps over which the learning rate rises from near 0.
        step_fraction: Share of the run after which ``"step"`` drops.

    Raises:
        ValueError: If the schedule is neither, or the warm-up is not shorter than the run.
    """
    if schedule not in ("step", "cosine"):
        raise ValueError(f"schedule must be 'step' or 'cosine', got {schedule!r}.")
    if warmup_steps and warmup_steps >= num_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps}, but the whole run has {num_steps} steps; warm up for "
            "fewer."
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "step":
            return 1.0 if step < step_fraction * num_steps else 0.1
        progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    return LambdaLR(optimizer, factor)


@dataclass
class TrainingProgress:
    """How far a run has come; part of a checkpoint, so that resuming needs no arithmetic.

    Attributes:
        epoch: Epoch that is running, from 0.
        batch: Batches of it that are done.
        step: Optimizer steps done since the start.
        best_map: Highest AP of an evaluation so far; -1 before the first.
        history: Results of every epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_map: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """The fields as a dictionary."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the fields from :meth:`state_dict`."""
        for name, value in state.items():
            setattr(self, name, value)


def write_directory(directory: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Create or replace a directory as a whole: it is there complete, or as it was before.

    Args:
        directory: What to create.
        write: Fills the directory that it is given, one beside the final place.
    """
    # Resolved, or "." would have no name.
    directory = Path(directory).resolve()
    partial = directory.with_name(directory.name + PARTIAL_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finish_directory(partial, directory)


def finish_directory(partial: Path, directory: Path) -> None:
    """Put a completely written directory into its final place."""
    previous = directory.with_name(directory.name + ".previous" + PARTIAL_SUFFIX)
    shutil.rmtree(previous, ignore_errors=True)
    if directory.exists():
        directory.rename(previous)
    partial.rename(directory)
    shutil.rmtree(previous, ignore_errors=True)


def checkpoint_name(step: int) -> str:
    """Directory name of a checkpoint; names sort by step."""
    return f"step_{step:08d}"


def list_checkpoints(directory: str | os.PathLike) -> list[Path]:
    """Complete checkpoints below a directory, oldest first."""
    found = Path(directory).glob("step_*")
    return sorted(path for path in found if path.suffix != PARTIAL_SUFFIX)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a json file; it is there complete or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
