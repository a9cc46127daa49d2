"""Optimizer settings of a paper: parameter groups and schedule of the learning rate."""

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hf_querydet.recipe_utils import Recipe


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


def continue_schedule(scheduler: LambdaLR, step: int) -> None:
    """Go on at a step, with the peaks and the weight decay that the optimizer was made with.

    Loading an optimizer brings the learning rates and the weight decay of its checkpoint beside the
    moments. What is asked for now rules; with the settings of before nothing changes.

    Args:
        scheduler: Of :func:`learning_rate_schedule`, whose own state has not been loaded: all that
            it knows follows from its settings and the step.
        step: Optimizer steps done.
    """
    optimizer = scheduler.optimizer
    scheduler.last_epoch = step
    scheduler._last_lr = []
    for group, peak, factor in zip(
        optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["initial_lr"], group["lr"] = peak, peak * factor(step)
        group["weight_decay"] = optimizer.defaults["weight_decay"]
        scheduler._last_lr.append(group["lr"])
