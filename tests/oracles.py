"""Set prediction losses by their definitions: plain numbers, loops, all permutations tried."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

Box = Sequence[float]


def giou(box: Box, other: Box) -> float:
    """Generalised IoU of two cxcywh boxes that have an area."""
    corners = []
    for cx, cy, width, height in (box, other):
        corners.append((cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2))
    (left, top, right, bottom), (left2, top2, right2, bottom2) = corners
    inner = max(min(right, right2) - max(left, left2), 0)
    inner *= max(min(bottom, bottom2) - max(top, top2), 0)
    union = box[2] * box[3] + other[2] * other[3] - inner
    hull = (max(right, right2) - min(left, left2)) * (max(bottom, bottom2) - min(top, top2))
    return inner / union - (hull - union) / hull


def l1(box: Box, other: Box) -> float:
    return sum(abs(a - b) for a, b in zip(box, other, strict=True))


def corner_l1(box: Box, other: Box) -> float:
    """L1 distance of the left, top, right and bottom sides of two cxcywh boxes."""
    return sum(
        abs((a + sign * size / 2) - (b + sign * other_size / 2))
        for a, size, b, other_size in zip(box[:2], box[2:], other[:2], other[2:], strict=True)
        for sign in (-1, 1)
    )


def softmax(logits: Sequence[float]) -> list[float]:
    powers = [math.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def focal_class_cost(logit: float, *, alpha: float = 0.25, gamma: float = 2.0) -> float:
    p = sigmoid(logit)
    positive = -alpha * (1 - p) ** gamma * math.log(p + 1e-8)
    negative = -(1 - alpha) * p**gamma * math.log(1 - p + 1e-8)
    return positive - negative


def focal_loss(logit: float, is_target: bool, *, alpha: float, gamma: float) -> float:
    p, weight = (sigmoid(logit), alpha) if is_target else (1 - sigmoid(logit), 1 - alpha)
    return -weight * (1 - p) ** gamma * math.log(p)


def cheapest_pairs(cost: Sequence[Sequence[float]], num_objects: int) -> list[tuple[int, int]]:
    """Pairs (query, object) of the cheapest one-to-one assignment."""
    queries, objects = range(len(cost)), range(num_objects)
    if len(queries) >= len(objects):
        chosen = itertools.permutations(queries, num_objects)
        candidates = [list(zip(p, objects, strict=True)) for p in chosen]
    else:
        chosen = itertools.permutations(objects, len(cost))
        candidates = [list(zip(queries, p, strict=True)) for p in chosen]
    return min(candidates, key=lambda pairs: sum(cost[query][target] for query, target in pairs))


def set_loss(
    logits: Tensor,
    pred_boxes: Tensor,
    labels: Sequence[Mapping[str, Tensor]],
    *,
    class_cost: float,
    bbox_cost: float,
    giou_cost: float,
    no_object_weight: float | None = None,
    alpha: float = 0.25,
    gamma: float = 2.0,
    distance: Callable[[Box, Box], float] = l1,
) -> dict[str, float]:
    """Terms of one layer: softmax classification with ``no_object_weight``, focal without."""
    class_sum = bbox_sum = giou_sum = weight_sum = 0.0
    for picture, label in enumerate(labels):
        scores, boxes = logits[picture].tolist(), pred_boxes[picture].tolist()
        classes, targets = label["class_labels"].tolist(), label["boxes"].tolist()
        cost = [
            [
                class_cost
                * (
                    focal_class_cost(score[index])
                    if no_object_weight is None
                    else -softmax(score)[index]
                )
                + bbox_cost * distance(box, target)
                - giou_cost * giou(box, target)
                for index, target in zip(classes, targets, strict=True)
            ]
            for score, box in zip(scores, boxes, strict=True)
        ]
        pairs = dict(cheapest_pairs(cost, len(targets)))
        for query, target in pairs.items():
            bbox_sum += distance(boxes[query], targets[target])
            giou_sum += 1 - giou(boxes[query], targets[target])
        for query, score in enumerate(scores):
            wanted = classes[pairs[query]] if query in pairs else None
            if no_object_weight is None:
                class_sum += sum(
                    focal_loss(logit, index == wanted, alpha=alpha, gamma=gamma)
                    for index, logit in enumerate(score)
                )
            else:
                weight = no_object_weight if wanted is None else 1.0
                index = len(score) - 1 if wanted is None else wanted
                class_sum -= weight * math.log(softmax(score)[index])
                weight_sum += weight
    num_boxes = max(sum(len(label["boxes"]) for label in labels), 1)
    return {
        "loss_ce": class_sum / (num_boxes if no_object_weight is None else weight_sum),
        "loss_bbox": bbox_sum / num_boxes,
        "loss_giou": giou_sum / num_boxes,
    }
