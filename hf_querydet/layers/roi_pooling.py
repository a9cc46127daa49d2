"""Features of boxes: which level of a pyramid a box reads, and RoIAlign on it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_querydet.layers.feature_levels import SpatialShapes
from hf_querydet.ops.multilevel_roi_align import multilevel_roi_align

# A box of ImageNet's usual picture size reads the level of stride 16.
CANONICAL_SIZE = 224
CANONICAL_LEVEL = 4
NO_LEVEL = -1


def check_strides(maps: Sequence[Tensor], canvas: Tensor, *, strides: Sequence[int]) -> None:
    """Raise unless the backbone's maps have the strides that regions are looked for at.

    Args:
        maps: (batch, channels, height, width) each, fine to coarse.
        canvas: What they were made of, (batch, channels, height, width), divisible by all strides.
        strides: That are needed, in pixels.

    Raises:
        ValueError: If there are maps of other strides, or not as many.
    """
    height, width = canvas.shape[-2:]
    sizes = [tuple(features.shape[-2:]) for features in maps]
    if sizes != [(height // stride, width // stride) for stride in strides]:
        raise ValueError(
            f"The backbone must give maps of strides {list(strides)}, got maps of {sizes} cells "
            f"for pictures of {(height, width)} pixels; set out_indices of backbone_config to "
            "those stages, and do not dilate it."
        )


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
    tokens: Tensor,
    spatial_shapes: SpatialShapes,
    boxes_xyxy: Tensor,
    *,
    finest_level: int,
    output_size: int = 7,
    sampling_ratio: int = 2,
) -> Tensor:
    """Pool a square of features for every box, from the one level that fits its size.

    Samples are placed in float32 at least: pixels beyond 256 or 2048 are too coarse in half types.
    Boxes may reach beyond the canvas. No gradient reaches them.

    Args:
        tokens: The pyramid, (batch, num_tokens, channels): maps of strides ``2 ** finest_level``,
            ``2 ** (finest_level + 1)`` and so on, see
            :func:`~hf_querydet.layers.feature_levels.flatten_levels`.
        spatial_shapes: (height, width) of every map.
        boxes_xyxy: (batch, num_boxes, 4), pixels of the canvas.
        finest_level: Level of the first map.
        output_size: Bins per side.
        sampling_ratio: Samples per bin and side.

    Returns:
        (batch, num_boxes, output_size ** 2, channels) of the tokens' type, bins row by row. Zeros
        for boxes without a level, see :func:`assign_levels`.
    """
    num_levels = len(spatial_shapes)
    levels = assign_levels(
        boxes_xyxy, finest_level=finest_level, coarsest_level=finest_level + num_levels - 1
    )
    return multilevel_roi_align(
        tokens,
        spatial_shapes,
        boxes_xyxy,
        levels - finest_level,
        strides=[2.0 ** (finest_level + index) for index in range(num_levels)],
        output_size=output_size,
        sampling_ratio=sampling_ratio,
    )
