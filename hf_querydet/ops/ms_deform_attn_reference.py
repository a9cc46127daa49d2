"""Multi-scale deformable attention in plain PyTorch, for every device and every exporter.

Letters: B batch, S tokens of all levels, M heads, D channels of a head, Q queries, L levels,
P points per level. Shapes and meaning of the arguments: `hf_querydet.ops.ms_deform_attn`.

Both functions work in float32, in float64 for float64 input, as the compiled kernels do.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BILINEAR, ZEROS = 0, 0  # aten's numbers for these modes of grid_sample


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute `ms_deform_attn` by one `grid_sample` per level.

    Levels are added one after another, so that the sampled values of one level at a time are in
    memory. Gradients come from autograd.

    Args:
        value: As in `ms_deform_attn`.
        spatial_shapes: Height and width of every level.
        sampling_locations: As in `ms_deform_attn`.
        attention_weights: As in `ms_deform_attn`.

    Returns:
        (B, Q, M * D), in the dtype of `value`.
    """
    batch, _, num_heads, head_size = value.shape
    num_queries = sampling_locations.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    output = value.new_zeros(batch * num_heads, head_size, num_queries, dtype=dtype)
    levels = _levels(value, spatial_shapes, sampling_locations, attention_weights, dtype)
    for level_map, grid, weights, _ in levels:
        output = output + (_sample(level_map, grid) * weights).sum(-1)
    output = output.view(batch, num_heads * head_size, num_queries).transpose(1, 2)
    return output.to(value.dtype).contiguous()


def ms_deform_attn_backward_reference(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the three gradients of `ms_deform_attn` without autograd.

    The dispatcher calls this in the place of a kernel, below the point where operations are
    recorded, so that the gradient is written out.

    Args:
        grad_output: Gradient of the output, (B, Q, M * D).
        value: As in `ms_deform_attn`.
        spatial_shapes: Height and width of every level.
        sampling_locations: As in `ms_deform_attn`.
        attention_weights: As in `ms_deform_attn`.

    Returns:
        Gradients of `value`, `sampling_locations` and `attention_weights`.
    """
    batch, _, num_heads, head_size = value.shape
    num_queries = sampling_locations.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    # (B * M, D, Q, 1)
    grad = grad_output.to(dtype).view(batch, num_queries, num_heads, head_size)
    grad = grad.permute(0, 2, 3, 1).reshape(batch * num_heads, head_size, num_queries, 1)
    grad_values, grad_locations, grad_weights = [], [], []
    levels = _levels(value, spatial_shapes, sampling_locations, attention_weights, dtype)
    for level_map, grid, weights, is_inside in levels:
        grad_weights.append((_sample(level_map, grid) * grad).sum(1))
        grad_map, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            grad * weights, level_map, grid, BILINEAR, ZEROS, False, [True, True]
        )
        grad_values.append(grad_map.flatten(2))
        # The grid runs from -1 to 1, locations from 0 to 1.
        grad_locations.append(torch.where(is_inside, 2.0 * grad_grid, 0.0))

    def by_query(grads: list[Tensor], like: Tensor) -> Tensor:
        """L tensors of (B * M, Q, P, ...) to (B, Q, M, L, P, ...)."""
        stacked = torch.stack(grads, 1).unflatten(0, (batch, num_heads))
        return stacked.movedim(3, 1).to(like.dtype).contiguous().view(like.shape)

    grad_value = torch.cat(grad_values, 2).view(batch, num_heads, head_size, -1)
    return (
        grad_value.permute(0, 3, 1, 2).to(value.dtype).contiguous(),
        by_query(grad_locations, sampling_locations),
        by_query(grad_weights, attention_weights),
    )


def _levels(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    dtype: torch.dtype,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield map (B*M, D, H, W), grid (B*M, Q, P, 2), weights (B*M, 1, Q, P), inside; per level."""
    batch, _, num_heads, head_size = value.shape
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        tokens = value.narrow(1, start, height * width)
        start = start + height * width
        level_map = tokens.permute(0, 2, 3, 1).reshape(batch * num_heads, head_size, height, width)
        # (B, Q, M, P, 2) -> (B * M, Q, P, 2)
        locations = sampling_locations[:, :, :, level].transpose(1, 2).flatten(0, 1).to(dtype)
        weights = attention_weights[:, :, :, level].transpose(1, 2).flatten(0, 1).to(dtype)
        columns = locations[..., 0] * width - 0.5
        rows = locations[..., 1] * height - 0.5
        is_inside = (columns > -1) & (columns < width) & (rows > -1) & (rows < height)
        # What grid_sample makes of NaN and infinity differs between devices; a point that takes
        # no part must also not pass on a NaN weight.
        locations = torch.where(is_inside[..., None], locations, -1.0)
        weights = torch.where(is_inside, weights, 0.0)
        yield level_map.to(dtype), 2 * locations - 1, weights[:, None], is_inside[..., None]


def _sample(level_map: Tensor, grid: Tensor) -> Tensor:
    """Bilinear samples, (B * M, D, Q, P), zero outside the level."""
    return F.grid_sample(
        level_map, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )
