"""Initial values of layers that need others than their module type has.

The functions write in place through `transformers.initialization`: values that were loaded from a
checkpoint stay, and modules that were built on the meta device are initialised where they end up.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import initialization as init

if TYPE_CHECKING:
    from hf_querydet.layers.deformable_attention import MultiScaleDeformableAttention


def init_deformable_attention(module: "MultiScaleDeformableAttention") -> None:
    """Give multi-scale deformable attention its initial values.

    Deformable DETR (arXiv:2010.04159), Sec. A.4: each head looks in a direction of its own, each
    point one cell further, all points with the same weight, whatever the query.

    Args:
        module: The layer to initialise.
    """
    init.zeros_(module.sampling_offsets.weight)
    init.copy_(module.sampling_offsets.bias, ring_offsets(module))
    init.zeros_(module.attention_weights.weight)
    init.zeros_(module.attention_weights.bias)
    for projection in (module.value_projection, module.output_projection):
        init.xavier_uniform_(projection.weight)
        init.zeros_(projection.bias)


def ring_offsets(module: "MultiScaleDeformableAttention") -> Tensor:
    """Offsets along the rims of squares around the reference point.

    Head m looks along angle 2 * pi * m / num_heads, with the longer side of the direction scaled to
    1. Point p lies p + 1 cells away, on every level the same.

    Args:
        module: The layer that the offsets are for.

    Returns:
        (num_heads * num_levels * num_points * 2,), in cells, on the device of the layer's bias.
    """
    bias = module.sampling_offsets.bias
    heads = torch.arange(module.num_heads, dtype=torch.float64, device=bias.device)
    angles = heads * (2.0 * math.pi / module.num_heads)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, module.num_points + 1, dtype=torch.float64, device=bias.device)
    # (heads, levels, points, 2)
    offsets = directions[:, None, None] * steps[:, None]
    return offsets.expand(-1, module.num_levels, -1, -1).flatten().to(bias.dtype)
