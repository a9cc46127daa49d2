"""RoIAlign of boxes that each read one of several feature levels.

B batch, S tokens of all levels, C channels, N boxes, L levels.

A bin is the mean of a few samples, so that it is deformable attention with fixed points and equal
weights, and the kernels of :mod:`hf_querydet.ops.deformable_attention_op` do the work. Samples on
levels that a box does not read are placed outside, where they cost nothing. As an operator of its
own it is a single node of compiled and exported graphs, keeps boxes and no samples for the
backward, and its operations can be counted. Only ONNX, which knows no operators of ours, gets the
plain PyTorch of the samples and of the attention.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hf_querydet.ops.deformable_attention_op import (
    alert_not_deterministic,
    choose_backward,
    choose_forward,
    is_in_onnx_export,
    ms_deform_attn,
    refuse_forward_mode,
)

OUTSIDE = -1.0


def multilevel_roi_align(
    tokens: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    boxes_xyxy: Tensor,
    level_indices: Tensor,
    *,
    strides: Sequence[float],
    output_size: int,
    sampling_ratio: int,
) -> Tensor:
    """Pool every box from its level, with aligned corners of half a pixel.

    RoIAlign: Mask R-CNN (arXiv:1703.06870), Sec. 3; shifted by half a pixel as torchvision's with
    ``aligned=True``. Border cells continue for one cell beyond the map, from where on it is 0.
    Samples are placed in float32 at least. Boxes get no gradient.

    Args:
        tokens: (B, S, C), the levels one after the other, each row-major.
        spatial_shapes: (height, width) of every level, in cells.
        boxes_xyxy: (B, N, 4), pixels of the canvas.
        level_indices: (B, N), int64, position in ``spatial_shapes``. A box with an index outside of
            0 .. L - 1 pools zeros.
        strides: Pixels per cell of each level.
        output_size: Bins per side.
        sampling_ratio: Samples per bin and side, averaged.

    Returns:
        (B, N, output_size ** 2, C), bins row by row, in the type of ``tokens``.

    Raises:
        NotImplementedError: In forward-mode differentiation.
        RuntimeError: From the backward on a GPU, if `torch.use_deterministic_algorithms` is on.
        ValueError: If there are not as many strides as levels.
    """
    if len(strides) != len(spatial_shapes):
        raise ValueError(
            f"strides must be one per level, got {len(strides)} for {len(spatial_shapes)}."
        )
    refuse_forward_mode("multilevel_roi_align", tokens)
    sizes = [side for level in spatial_shapes for side in level]
    boxes = boxes_xyxy.detach().to(torch.promote_types(tokens.dtype, torch.float32))
    options = ([float(stride) for stride in strides], output_size, sampling_ratio)
    if is_in_onnx_export():
        samples = _samples(sizes, boxes, level_indices, *options)
        pooled = ms_deform_attn(tokens[:, :, None], spatial_shapes, *samples)
        return pooled.unflatten(1, (boxes.shape[1], output_size**2))
    return _forward(tokens, sizes, boxes, level_indices, *options)


def _samples(
    sizes: Sequence[int],
    boxes: Tensor,
    level_indices: Tensor,
    strides: Sequence[float],
    output_size: int,
    sampling_ratio: int,
) -> tuple[Tensor, Tensor]:
    """Locations (B, N * bins, 1, L, samples per bin, 2) and weights, one dimension less."""
    num_levels, side = len(strides), output_size * sampling_ratio
    steps = (torch.arange(side, dtype=boxes.dtype, device=boxes.device) + 0.5) / side
    is_read = level_indices[..., None] == torch.arange(num_levels, device=boxes.device)

    def place(low: Tensor, high: Tensor, level_sizes: Sequence[int]) -> Tensor:
        """Where samples lie along one axis, (B, N, bins per side, L, samples per bin and side)."""
        position = low[..., None] + (high - low)[..., None] * steps
        # Not new_tensor of them all: exporters would take sizes that are open for constants.
        length = torch.stack([boxes.new_full((1,), size) for size in level_sizes])
        cell = position[:, :, None] / boxes.new_tensor(strides)[:, None] - 0.5
        is_inside = (cell >= -1) & (cell <= length) & is_read[..., None]
        location = (cell.clamp(min=0).minimum(length - 1) + 0.5) / length
        location = torch.where(is_inside, location, OUTSIDE)
        return location.unflatten(3, (output_size, sampling_ratio)).transpose(2, 3)

    left, top, right, bottom = boxes.unbind(-1)
    x = place(left, right, sizes[1::2])[:, :, None, :, :, None, :]
    y = place(top, bottom, sizes[::2])[:, :, :, None, :, :, None]
    # (B, N, bin row, bin column, L, sample row, sample column, 2)
    locations = torch.stack(torch.broadcast_tensors(x, y), dim=-1)
    locations = locations.flatten(5, 6).flatten(1, 3)[:, :, None]
    weights = boxes.new_full((1, 1, 1, num_levels, sampling_ratio**2), 1 / sampling_ratio**2)
    return locations, weights.expand(locations.shape[:-1])


@torch.library.custom_op("hf_querydet::multilevel_roi_align", mutates_args=())
def _forward(
    tokens: Tensor,
    sizes: Sequence[int],
    boxes: Tensor,
    level_indices: Tensor,
    strides: Sequence[float],
    output_size: int,
    sampling_ratio: int,
) -> Tensor:
    samples = _samples(sizes, boxes, level_indices, strides, output_size, sampling_ratio)
    pooled = choose_forward(tokens[:, :, None], sizes, *samples)
    return pooled.unflatten(1, (boxes.shape[1], output_size**2))


@_forward.register_fake
def _(
    tokens: Tensor,
    sizes: Sequence[int],
    boxes: Tensor,
    level_indices: Tensor,
    strides: Sequence[float],
    output_size: int,
    sampling_ratio: int,
) -> Tensor:
    return tokens.new_empty(*boxes.shape[:2], output_size**2, tokens.shape[2])


@torch.library.custom_op("hf_querydet::multilevel_roi_align_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    tokens: Tensor,
    sizes: Sequence[int],
    boxes: Tensor,
    level_indices: Tensor,
    strides: Sequence[float],
    output_size: int,
    sampling_ratio: int,
) -> Tensor:
    samples = _samples(sizes, boxes, level_indices, strides, output_size, sampling_ratio)
    gradients = choose_backward(gradient.flatten(1, 2), tokens[:, :, None], sizes, *samples)
    return gradients[0].squeeze(2)


@_backward.register_fake
def _(
    gradient: Tensor,
    tokens: Tensor,
    sizes: Sequence[int],
    boxes: Tensor,
    level_indices: Tensor,
    strides: Sequence[float],
    output_size: int,
    sampling_ratio: int,
) -> Tensor:
    return tokens.new_empty(tokens.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tokens, ctx.sizes, boxes, level_indices, *ctx.options = inputs
    ctx.save_for_backward(tokens, boxes, level_indices)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple:
    tokens, boxes, level_indices = ctx.saved_tensors
    alert_not_deterministic("multilevel_roi_align", tokens.device.type)
    grad_tokens = _backward(gradient, tokens, ctx.sizes, boxes, level_indices, *ctx.options)
    return grad_tokens, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.hf_querydet.multilevel_roi_align)
def _forward_flops(
    tokens_shape: torch.Size,
    sizes: Sequence[int],
    boxes_shape: torch.Size,
    indices_shape: torch.Size,
    strides: Sequence[float],
    output_size: int,
    sampling_ratio: int,
    *args: object,
    **kwargs: object,
) -> int:
    """Four corners per sample and channel, a multiplication and an addition each."""
    num_samples = boxes_shape[0] * boxes_shape[1] * (output_size * sampling_ratio) ** 2
    return 8 * num_samples * tokens_shape[2]


@register_flop_formula(torch.ops.hf_querydet.multilevel_roi_align_backward)
def _backward_flops(gradient_shape: torch.Size, *args: object, **kwargs: object) -> int:
    """As forward, once for the products with the tokens and once for their gradient."""
    return 2 * _forward_flops(*args)
