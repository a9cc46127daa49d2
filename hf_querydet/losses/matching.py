"""Assignment of predictions to objects: cost matrix and Hungarian algorithm.

L layers, B pictures, Q queries, T objects (the largest number in a picture; fewer are filled up),
C classes.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_querydet.ops.boxes import boxes_cxcywh_to_xyxy, generalized_box_iou

# Replaces costs that are not numbers, which the solver refuses. The loss of such predictions is not
# finite either, and that is where it should show.
UNUSABLE_COST = 1e6


def softmax_class_cost(logits: Tensor, class_labels: Tensor) -> Tensor:
    """Minus the probability of each object's class (DETR, arXiv:2005.12872, Sec. 3.1).

    The probability and not its logarithm, which makes the term commensurable to the box costs.

    Args:
        logits: (L, B, Q, C), the last class being "no object".
        class_labels: (B, T).

    Returns:
        (L, B, Q, T).
    """
    return -_gather_classes(logits.softmax(-1), class_labels)


def focal_class_cost(
    logits: Tensor, class_labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Focal loss if the query were the object, minus its focal loss as background.

    Deformable DETR's authors; Conditional DETR, Anchor DETR, Sparse R-CNN alike.

    Args:
        logits: (L, B, Q, C).
        class_labels: (B, T).
        alpha: Weight of the positive term.
        gamma: Exponent of both.

    Returns:
        (L, B, Q, T).
    """
    probability = _gather_classes(logits, class_labels).sigmoid()
    positive = alpha * (1 - probability) ** gamma * -(probability + 1e-8).log()
    negative = (1 - alpha) * probability**gamma * -(1 - probability + 1e-8).log()
    return positive - negative


def centers_and_sizes(boxes_cxcywh: Tensor) -> Tensor:
    """Coordinates of DETR's L1 distance: those of the boxes, unchanged."""
    return boxes_cxcywh


def box_cost(
    pred_boxes_cxcywh: Tensor,
    boxes_cxcywh: Tensor,
    *,
    bbox_cost: float,
    giou_cost: float,
    box_coordinates: Callable[[Tensor], Tensor] = centers_and_sizes,
) -> Tensor:
    """Weighted L1 distance minus weighted generalised IoU of all pairs.

    Args:
        pred_boxes_cxcywh: (L, B, Q, 4).
        boxes_cxcywh: (B, T, 4).
        bbox_cost: Weight of the L1 distance.
        giou_cost: Weight of the generalised IoU.
        box_coordinates: Coordinates of cxcywh boxes whose L1 distance is taken.

    Returns:
        (L, B, Q, T).
    """
    distance = torch.cdist(
        box_coordinates(pred_boxes_cxcywh), box_coordinates(boxes_cxcywh)[None], p=1
    )
    giou = generalized_box_iou(
        boxes_cxcywh_to_xyxy(pred_boxes_cxcywh)[..., :, None, :],
        boxes_cxcywh_to_xyxy(boxes_cxcywh)[None, :, None],
    )
    return bbox_cost * distance - giou_cost * giou


def assign(
    cost: np.ndarray, num_objects: list[int], is_usable: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """Cheapest one-to-one assignment of queries to objects, per layer and picture.

    Args:
        cost: (L, B, Q, T) on the host.
        num_objects: Objects in each picture; columns beyond are ignored.
        is_usable: (B, Q), which queries take part; None if all do.

    Returns:
        Four int64 arrays of one length, a matched pair each: layer, picture, query, object.
        A picture with more objects than queries has only as many pairs as queries.
    """
    if is_usable is None:
        is_usable = np.ones(cost.shape[1:3], dtype=bool)
    pairs = []
    solvable = np.nan_to_num(cost, nan=UNUSABLE_COST, posinf=UNUSABLE_COST, neginf=-UNUSABLE_COST)
    for layer, layer_cost in enumerate(solvable):
        for picture, count in enumerate(num_objects):
            taking_part = np.flatnonzero(is_usable[picture])
            rows, objects = linear_sum_assignment(layer_cost[picture, taking_part, :count])
            queries = taking_part[rows]
            layers = np.full_like(queries, layer)
            pairs.append(np.stack([layers, np.full_like(queries, picture), queries, objects]))
    if not pairs:
        pairs.append(np.empty((4, 0), dtype=np.int64))
    return tuple(np.concatenate(pairs, axis=1).astype(np.int64))


def _gather_classes(scores: Tensor, class_labels: Tensor) -> Tensor:
    num_layers, _, num_queries, _ = scores.shape
    # Labels out of range are reported once the costs are on the host; until then they must not
    # read beyond the classes.
    index = class_labels.clamp(0, scores.shape[-1] - 1)[None, :, None]
    return scores.gather(-1, index.expand(num_layers, -1, num_queries, -1))
