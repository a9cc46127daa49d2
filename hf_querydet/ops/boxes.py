"""Boxes: formats, overlaps, and the logit space in which detectors refine them.

Every box tensor ends in a dimension of 4. ``cxcywh`` is (centre x, centre y, width, height),
``xyxy`` is (left, top, right, bottom). Nothing here depends on the unit.
"""

import math

import torch
from torch import Tensor

# A box grows at most this much in one step of apply_box_deltas, as a logarithm.
MAX_LOG_SCALE = math.log(100_000 / 16)
# What clipped relative boxes exceed 0 to 1 by in rounding; boxes in pixels exceed it by far more.
BOX_TOLERANCE = 1e-3


def boxes_cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Convert boxes from centre and size to corners, (..., 4) to (..., 4)."""
    center, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat([center - 0.5 * size, center + 0.5 * size], dim=-1)


def boxes_xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Convert boxes from corners to centre and size, (..., 4) to (..., 4)."""
    top_left, bottom_right = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(top_left + bottom_right) * 0.5, bottom_right - top_left], dim=-1)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """Area of each box, (..., 4) to (...). A box whose corners are swapped has area 0."""
    width, height = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0).unbind(-1)
    return width * height


def box_iou(boxes_xyxy: Tensor, other_xyxy: Tensor) -> Tensor:
    """Intersection over union of boxes that broadcast against each other.

    Two boxes of area zero have no union; their IoU is defined as 0 so that it stays finite.

    Args:
        boxes_xyxy: (..., 4). Insert a dimension for all pairs: ``boxes[:, None]``.
        other_xyxy: (..., 4), broadcastable to ``boxes_xyxy``.

    Returns:
        IoU in [0, 1], of the broadcast shape without the last dimension.
    """
    intersection, union = _intersection_and_union(boxes_xyxy, other_xyxy)
    return _ratio(intersection, union)


def generalized_box_iou(boxes_xyxy: Tensor, other_xyxy: Tensor) -> Tensor:
    """Generalised IoU of boxes that broadcast against each other (arXiv:1902.09630, Algorithm 1).

    IoU minus the share of the smallest enclosing box that neither box covers. Where the authors
    divide by zero (boxes of no area), the ratio is 0 here, so that value and gradient stay finite.

    Args:
        boxes_xyxy: (..., 4). Insert a dimension for all pairs: ``boxes[:, None]``.
        other_xyxy: (..., 4), broadcastable to ``boxes_xyxy``.

    Returns:
        GIoU in [-1, 1], of the broadcast shape without the last dimension.
    """
    intersection, union = _intersection_and_union(boxes_xyxy, other_xyxy)
    hull_top_left = torch.minimum(boxes_xyxy[..., :2], other_xyxy[..., :2])
    hull_bottom_right = torch.maximum(boxes_xyxy[..., 2:], other_xyxy[..., 2:])
    hull = box_area(torch.cat([hull_top_left, hull_bottom_right], dim=-1))
    return _ratio(intersection, union) - _ratio(hull - union, hull)


def inverse_sigmoid(probability: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of a probability, with both ends clamped to ``eps`` so that it stays finite.

    The clamp is the one of Deformable DETR (arXiv:2010.04159): the numerator and the denominator
    are bounded below by ``eps``, each on its own.
    """
    probability = probability.clamp(0, 1)
    return torch.log(probability.clamp(min=eps) / (1 - probability).clamp(min=eps))


def refine_boxes(box_deltas: Tensor, reference_boxes: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Move reference boxes by predicted deltas.

    One step of iterative bounding box refinement: the delta is added in inverse-sigmoid space, so
    every coordinate stays between 0 and 1. Deformable DETR (arXiv:2010.04159), Sec. 4.2.

    Args:
        box_deltas: Raw output of the box head, (batch, num_queries, 4), unbounded.
        reference_boxes: Boxes to refine, same shape, normalised cxcywh in [0, 1].
        eps: Lower bound of both parts of the logarithm, see :func:`inverse_sigmoid`.

    Returns:
        Refined boxes, same shape, normalised cxcywh in (0, 1).

    Raises:
        ValueError: If the two shapes differ.
    """
    if box_deltas.shape != reference_boxes.shape:
        raise ValueError(
            "box_deltas and reference_boxes must have the same shape, "
            f"got {tuple(box_deltas.shape)} and {tuple(reference_boxes.shape)}."
        )
    return (box_deltas + inverse_sigmoid(reference_boxes, eps)).sigmoid()


def place_boxes(box_deltas: Tensor, reference_points: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Make boxes from predicted deltas around reference points.

    As :func:`refine_boxes` where the reference has a centre and no size: only the centre is
    relative to it. Deformable DETR (arXiv:2010.04159), Sec. 4.1 and A.3.

    Args:
        box_deltas: Raw output of the box head, (..., 4), unbounded.
        reference_points: (..., 2), normalised (x, y) in [0, 1].
        eps: Lower bound of both parts of the logarithm, see :func:`inverse_sigmoid`.

    Returns:
        Boxes of the shape of box_deltas, normalised cxcywh in (0, 1).

    Raises:
        ValueError: If the shapes do not fit.
    """
    if box_deltas.shape != (*reference_points.shape[:-1], 4) or reference_points.shape[-1] != 2:
        raise ValueError(
            "box_deltas and reference_points must have the same shape up to a last dimension of 4 "
            f"and of 2, got {tuple(box_deltas.shape)} and {tuple(reference_points.shape)}."
        )
    centers = box_deltas[..., :2] + inverse_sigmoid(reference_points, eps)
    return torch.cat([centers, box_deltas[..., 2:]], dim=-1).sigmoid()


def apply_box_deltas(box_deltas: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """Move and scale boxes by predicted deltas, relative to their size.

    R-CNN's parametrisation (arXiv:1311.2524, Appendix C): the centre moves by a share of the box's
    width and height, width and height are multiplied by the exponential of their delta. Deltas of
    the centre are divided by 2 and the logarithm is limited from above to log(100000 / 16), as in
    the code of Sparse R-CNN's authors. Boxes are not clipped to any picture.

    Args:
        box_deltas: (..., 4), raw: of the centre x and y, of the logarithm of width and height.
        boxes_xyxy: Boxes to refine, same shape, absolute.

    Returns:
        Refined boxes xyxy, same shape, at least float32: half types are too coarse for pixels.

    Raises:
        ValueError: If the two shapes differ.
    """
    if box_deltas.shape != boxes_xyxy.shape:
        raise ValueError(
            "box_deltas and boxes_xyxy must have the same shape, "
            f"got {tuple(box_deltas.shape)} and {tuple(boxes_xyxy.shape)}."
        )
    boxes_xyxy = boxes_xyxy.to(torch.promote_types(boxes_xyxy.dtype, torch.float32))
    box_deltas = box_deltas.to(boxes_xyxy.dtype)
    size = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    center = boxes_xyxy[..., :2] + 0.5 * size + 0.5 * box_deltas[..., :2] * size
    half_size = 0.5 * size * box_deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp()
    return torch.cat([center - half_size, center + half_size], dim=-1)


def _intersection_and_union(boxes_xyxy: Tensor, other_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    top_left = torch.maximum(boxes_xyxy[..., :2], other_xyxy[..., :2])
    bottom_right = torch.minimum(boxes_xyxy[..., 2:], other_xyxy[..., 2:])
    intersection = box_area(torch.cat([top_left, bottom_right], dim=-1))
    union = box_area(boxes_xyxy) + box_area(other_xyxy) - intersection
    return intersection, union


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    # The denominator is replaced before the division: 0/0 would poison the gradient even where
    # its value is discarded.
    empty = denominator <= 0
    return (numerator / denominator.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
