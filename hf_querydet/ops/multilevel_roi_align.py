"""RoIAlign of boxes that each read one of several feature levels.

N boxes, L levels, C channels, S the side of a pooled map.

torchvision's operator pools from one map. Which boxes read which level depends on data, and so do
the sizes of the calls; as an operator of its own the selection is a single node of compiled and
exported graphs, and no box is pooled on levels that it does not read.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torchvision  # noqa: F401 - registers torch.ops.torchvision
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def multilevel_roi_align(
    levels: Sequence[Tensor],
    rois: Tensor,
    level_indices: Tensor,
    *,
    strides: Sequence[float],
    output_size: int,
    sampling_ratio: int,
) -> Tensor:
    """Pool every box from its level, with aligned corners of half a pixel.

    RoIAlign: Mask R-CNN (arXiv:1703.06870), Sec. 3; shifted by half a pixel as in torchvision's
    ``aligned=True``. Cells outside the map are read as 0 beyond one cell from its border. Boxes get
    no gradient.

    Args:
        levels: L maps (batch, C, height, width), float32 or float64.
        rois: (N, 5): index of the picture, then the box as xyxy in pixels of the canvas, of the
            type of the levels.
        level_indices: (N,), int64, position in ``levels``. A box with an index outside of 0 .. L -
            1 pools zeros.
        strides: Pixels per cell of each level.
        output_size: S, bins per side.
        sampling_ratio: Samples per bin and side, averaged.

    Returns:
        (N, C, S, S).

    Raises:
        ValueError: If there are not as many strides as levels.
    """
    if len(strides) != len(levels):
        raise ValueError(f"strides must be one per level, got {len(strides)} for {len(levels)}.")
    scales = [1 / stride for stride in strides]
    return _forward(list(levels), rois, level_indices, scales, output_size, sampling_ratio)


@torch.library.custom_op("hf_querydet::multilevel_roi_align", mutates_args=())
def _forward(
    levels: Sequence[Tensor],
    rois: Tensor,
    level_indices: Tensor,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int,
) -> Tensor:
    pooled = rois.new_zeros(len(rois), levels[0].shape[1], output_size, output_size)
    for index, (features, scale) in enumerate(zip(levels, scales, strict=True)):
        chosen = (level_indices == index).nonzero().squeeze(1)
        pooled[chosen] = torch.ops.torchvision.roi_align(
            features, rois[chosen], scale, output_size, output_size, sampling_ratio, True
        )
    return pooled


@_forward.register_fake
def _(
    levels: Sequence[Tensor],
    rois: Tensor,
    level_indices: Tensor,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int,
) -> Tensor:
    return rois.new_empty(rois.shape[0], levels[0].shape[1], output_size, output_size)


@torch.library.custom_op("hf_querydet::multilevel_roi_align_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    rois: Tensor,
    level_indices: Tensor,
    sizes: Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
) -> list[Tensor]:
    gradients = []
    for index, scale in enumerate(scales):
        chosen = (level_indices == index).nonzero().squeeze(1)
        gradients.append(
            torch.ops.torchvision._roi_align_backward(
                gradient[chosen],
                rois[chosen],
                scale,
                *gradient.shape[-2:],
                *sizes[4 * index : 4 * index + 4],
                sampling_ratio,
                True,
            )
        )
    return gradients


@_backward.register_fake
def _(
    gradient: Tensor,
    rois: Tensor,
    level_indices: Tensor,
    sizes: Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
) -> list[Tensor]:
    return [gradient.new_empty(sizes[4 * i : 4 * i + 4]) for i in range(len(scales))]


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    levels, rois, level_indices, ctx.scales, _, ctx.sampling_ratio = inputs
    # Their sizes and not the maps themselves, which nothing else keeps in memory.
    ctx.sizes = [side for features in levels for side in features.shape]
    ctx.save_for_backward(rois, level_indices)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple:
    rois, level_indices = ctx.saved_tensors
    gradients = _backward(
        gradient.contiguous(), rois, level_indices, ctx.sizes, ctx.scales, ctx.sampling_ratio
    )
    return gradients, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.hf_querydet.multilevel_roi_align)
def _flops(
    level_shapes: Sequence[torch.Size],
    rois_shape: torch.Size,
    indices_shape: torch.Size,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int,
    *args: object,
    **kwargs: object,
) -> int:
    """Four corners per sample and channel, a multiplication and an addition each."""
    num_samples = rois_shape[0] * (output_size * sampling_ratio) ** 2
    return 8 * num_samples * level_shapes[0][1]
