"""Loss terms of set prediction, as plain functions of tensors in float32."""

import torch
from torch import Tensor
from torch.nn import functional as F


def no_object_cross_entropy(
    logits: Tensor, target_classes: Tensor, *, no_object_weight: float
) -> Tensor:
    """Cross-entropy over the classes and "no object", down-weighted for the latter.

    DETR (arXiv:2005.12872), Eq. 2. The last class is "no object".

    Args:
        logits: (..., num_queries, num_labels + 1).
        target_classes: (..., num_queries), int64; ``num_labels`` stands for "no object".
        no_object_weight: Weight of a query without an object; 0.1 in the paper.

    Returns:
        Weighted loss of each query, (..., num_queries). DETR divides its sum by the sum of weights.
    """
    no_object = logits.shape[-1] - 1
    loss = F.cross_entropy(logits.flatten(0, -2), target_classes.flatten(), reduction="none")
    loss = loss.view(target_classes.shape)
    return torch.where(target_classes == no_object, no_object_weight * loss, loss)


def sigmoid_focal_loss(
    logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Focal loss of independent classes (arXiv:1708.02002, Eq. 5).

    Args:
        logits: Any shape.
        targets: Same shape, 0 or 1.
        alpha: Weight of positives; negatives get 1 - alpha.
        gamma: Exponent that fades out what is classified well.

    Returns:
        Loss of each element, same shape.
    """
    # Both factors come from logarithms of probabilities, so that no value is rounded to 0 and no
    # gradient is infinite where the sigmoid saturates.
    target_logits = (2 * targets - 1) * logits
    miss = torch.exp(-gamma * F.softplus(target_logits))
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * miss * F.softplus(-target_logits)
