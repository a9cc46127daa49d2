"""Batch norm's statistics where several processes train."""

from accelerate import Accelerator, DistributedType
from torch import nn


def average_statistics(
    accelerator: Accelerator, model: nn.Module, average: nn.Module | None = None
) -> None:
    """Give all processes the mean of their statistics, where these would differ.

    Every process sees other pictures, and its batch norms keep other statistics. For a model, DDP
    hands out the first process's before each forward; FSDP lets them drift apart, and of what is
    saved a part would be one process's and a part another's. An average of weights follows the
    statistics of its own process everywhere. So call this before evaluating and saving.

    Args:
        accelerator: That has prepared ``model``.
        model: Statistics of its batch norms are changed in place where weights are divided (FSDP);
            frozen norms stay as they are.
        average: Of :func:`weight_average`; changed likewise.
    """
    parts = [model] if accelerator.distributed_type == DistributedType.FSDP else []
    if average is not None:
        parts.append(average)
    for module in [module for part in parts for module in part.modules()]:
        if isinstance(module, nn.BatchNorm2d):
            for statistic in (module.running_mean, module.running_var):
                statistic.copy_(accelerator.reduce(statistic, reduction="mean"))
