"""Loss terms for the log, and the end of a run whose loss is not a number."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


class NonFiniteLossError(RuntimeError):
    """The loss is infinite or not a number, so that training on would ruin the weights."""


def mean_loss_terms(
    accelerator: Accelerator, outputs: Any, labels: Sequence[Mapping[str, Tensor]], step: int
) -> dict[str, float]:
    """Loss and its terms, averaged over processes, on the host.

    Every process must call this, before the gradients are computed. If any process has a loss that
    is not finite, all of them raise the same error, so that none is left waiting.

    Args:
        accelerator: Of the run.
        outputs: Of a detector, with ``loss`` and ``loss_dict``.
        labels: Of the batch, for the image ids.
        step: Number of the optimizer step, for the message.

    Returns:
        ``loss`` and the entries of ``loss_dict``.

    Raises:
        NonFiniteLossError: Names the step, the loss, the terms and the image ids.
    """
    terms = {"loss": outputs.loss, **outputs.loss_dict}
    values = torch.stack([value.detach().float() for value in terms.values()])
    means = accelerator.reduce(values, reduction="mean").tolist()
    if not all(map(math.isfinite, means)):
        found = None if values.isfinite().all() else _describe(terms, labels)
        problems = [problem for problem in gather_object([found]) if problem is not None]
        advice = (
            "fp16 has a small range: try bf16."
            if accelerator.mixed_precision == "fp16"
            else "Lower the learning rate, warm up for longer, or look at these pictures."
        )
        raise NonFiniteLossError(f"Stopped at step {step}: {'; '.join(problems)}. {advice}")
    return dict(zip(terms, means, strict=True))


def _describe(terms: Mapping[str, Tensor], labels: Sequence[Mapping[str, Tensor]]) -> str:
    names = [name for name, value in terms.items() if name != "loss" and not value.isfinite()]
    image_ids = [int(label["image_id"]) for label in labels]
    return f"the loss is {terms['loss'].item()} ({', '.join(names)}) for image ids {image_ids}"
