"""A second set of weights that follows those in training."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def weight_average(
    model: nn.Module, *, decay: float, device: torch.device | str | None = None
) -> AveragedModel:
    """Exponential moving average of a model's weights, to be evaluated and saved in their place.

    After step n it becomes ``d * average + (1 - d) * weights`` with ``d = min(decay, (1 + n) /
    (10 + n))``: the first weights, which are random, are forgotten quickly, and a short run is not
    dominated by them. Running statistics of norms are averaged as well.

    Args:
        model: Before it is prepared for several processes.
        decay: 0 to 1; 0.9998 remembers some five thousand steps.
        device: Where the average is kept; not given: where the model is.

    Returns:
        Call its ``update_parameters(model)`` after every optimizer step. ``module`` is the averaged
        model, in evaluation mode. It has a ``state_dict`` for checkpoints.

    Raises:
        ValueError: If ``decay`` is not between 0 and 1.
    """
    if not 0 < decay < 1:
        raise ValueError(f"decay must lie between 0 and 1, for instance 0.9998; got {decay}.")

    def update(averages: list[Tensor], weights: list[Tensor], num_averaged: Tensor | int) -> None:
        step = int(num_averaged)
        step_decay = min(decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(step_decay)(averages, weights, num_averaged)

    average = AveragedModel(model, device=device, multi_avg_fn=update, use_buffers=True)
    average.requires_grad_(False)
    return average.eval()
