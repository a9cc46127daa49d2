"""Features of boxes: which level of a pyramid a box reads, and RoIAlign on it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_querydet.ops.multilevel_roi_align import multilevel_roi_align

# A box of ImageNet's usual picture size reads the level of stride 16.
CANONICAL_SIZE = 224
CANONICAL_LEVEL = 4
NO_LEVEL = -1


def assign_levels(boxes_xyxy: Tensor, *, finest_level: int, coarsest_level: int) -> Tensor:
    """Pyramid level that each box reads, by the root of its area.

    Feature pyramid networks (arXiv:1612.03144), Eq. 1: a box of 224 pixels a side reads level 4,
    each doubling of the side one level more. Level k has stride 2 ** k.

    Args:
        boxes_xyxy: (..., 4), pixels.
        finest_level: Smaller boxes read this one.
        coarsest_level: Larger boxes read this one.

    Returns:
        (...), int64; -1 where the area is negative or not a number, so that there is no level.
    """
    width, height = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).unbind(-1)
    size = (width * height).sqrt() / CANONICAL_SIZE
    # The small number keeps the logarithm of an empty box finite.
    levels = (CANONICAL_LEVEL + (size + 1e-8).log2()).floor()
    return levels.clamp(finest_level, coarsest_level).nan_to_num(NO_LEVEL).to(torch.int64)


def level_strides(boxes_xyxy: Tensor, *, finest_level: int, num_levels: int) -> Tensor:
    """Stride of the pyramid level that :func:`pool_regions` reads each box from.

    Args:
        boxes_xyxy: (..., 4), pixels of the canvas.
        finest_level: Level of the first map.
        num_levels: Number of maps.

    Returns:
        (...), int64, pixels; 0 for boxes without a level, see :func:`assign_levels`.
    """
    levels = assign_levels(
        boxes_xyxy, finest_level=finest_level, coarsest_level=finest_level + num_levels - 1
    )
    return (2 ** levels.clamp(min=0)).masked_fill(levels == NO_LEVEL, 0)


def pool_regions(
    levels: Sequence[Tensor],
    boxes_xyxy: Tensor,
    *,
    finest_level: int,
    output_size: int = 7,
    sampling_ratio: int = 2,
) -> Tensor:
    """Pool a square of features for every box, from the one level that fits its size.

    Computed in float32 at least: pixels beyond 256 or 2048 are too coarse in half types, and the
    operator does not take all of them. Boxes may reach beyond the canvas. No gradient reaches them.

    Args:
        levels: Maps (batch, channels, height, width), fine to coarse, of strides
            ``2 ** finest_level``, ``2 ** (finest_level + 1)`` and so on.
        boxes_xyxy: (batch, num_boxes, 4), pixels of the canvas.
        finest_level: Level of the first map.
        output_size: Bins per side.
        sampling_ratio: Samples per bin and side.

    Returns:
        (batch, num_boxes, output_size ** 2, channels) of the levels' type, bins row by row. Zeros
        for boxes without a level, see :func:`assign_levels`.
    """
    dtype = torch.promote_types(levels[0].dtype, torch.float32)
    boxes = boxes_xyxy.detach().to(dtype)
    batch_size, num_boxes, _ = boxes.shape
    pictures = torch.arange(batch_size, device=boxes.device, dtype=dtype)
    pictures = pictures[:, None, None].expand(-1, num_boxes, 1)
    level_indices = assign_levels(
        boxes, finest_level=finest_level, coarsest_level=finest_level + len(levels) - 1
    )
    pooled = multilevel_roi_align(
        [features.to(dtype) for features in levels],
        torch.cat([pictures, boxes], dim=-1).flatten(0, 1),
        (level_indices - finest_level).flatten(),
        strides=[2.0 ** (finest_level + index) for index in range(len(levels))],
        output_size=output_size,
        sampling_ratio=sampling_ratio,
    )
    # (batch * num_boxes, channels, bins, bins) to (batch, num_boxes, bins ** 2, channels)
    regions = pooled.flatten(2).transpose(1, 2).to(levels[0].dtype)
    return regions.unflatten(0, (batch_size, num_boxes))
