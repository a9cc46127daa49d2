"""Batch norm's statistics where several processes train."""

from accelerate import Accelerator, DistributedType
from torch import nn


def average_statistics(accelerator: Accelerator, model: nn.Module) -> None:
    """Give all processes the mean of their statistics, where weights are divided (FSDP).

    Every process sees other pictures, and its batch norms keep other statistics. DDP hands out the
    first process's before each forward; FSDP lets them drift apart, and of what is saved a part
    would be one process's and a part another's. So call this before evaluating and saving.

    Args:
        accelerator: That has prepared ``model``.
        model: Statistics of its batch norms are changed in place; frozen norms stay as they are.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for statistic in (module.running_mean, module.running_var):
                statistic.copy_(accelerator.reduce(statistic, reduction="mean"))
