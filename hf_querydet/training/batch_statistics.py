"""Batch norm's statistics where several processes train."""

from accelerate import Accelerator
from torch import nn


def average_statistics(
    accelerator: Accelerator, model: nn.Module, average: nn.Module | None = None
) -> None:
    """Give all processes the mean of their statistics.

    Every process sees other pictures, and its batch norms keep other statistics. DDP hands out the
    first process's before a forward, but not after the last one, nor within accumulation; FSDP and
    an average of weights let them drift apart. Each process would evaluate another model, and of
    FSDP's a part would be saved from one and a part from another. So call this before evaluating
    and saving.

    Args:
        accelerator: That has prepared ``model``.
        model: Statistics of its batch norms are changed in place; frozen norms stay as they are.
        average: Of :func:`weight_average`; changed likewise.
    """
    if accelerator.num_processes == 1:
        return
    parts = [model] if average is None else [model, average]
    for module in [module for part in parts for module in part.modules()]:
        if isinstance(module, nn.BatchNorm2d):
            for statistic in (module.running_mean, module.running_var):
                statistic.copy_(accelerator.reduce(statistic, reduction="mean"))
