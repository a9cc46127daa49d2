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
    from torch import nn

    from hf_querydet.layers.deformable_attention import MultiScaleDeformableAttention
    from hf_querydet.layers.feature_pyramid import FeaturePyramid
    from hf_querydet.layers.feed_forward import MLP

PRIOR_PROBABILITY = 0.01


def init_focal_prior(class_head: "nn.Linear") -> None:
    """Let every class start at a probability of 0.01, whatever the input.

    With focal loss, far more negatives than positives would otherwise rule the first steps
    (arXiv:1708.02002, Sec. 3.3). The bias is -log(99), that is -4.595; the weight is left alone.

    Args:
        class_head: Its last dimension are independent classes.
    """
    init.constant_(class_head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))


def init_box_head(box_head: "MLP", *, size_bias: float = 0.0) -> None:
    """Let a box head start with one answer, whatever the input.

    The authors of Deformable DETR set the last layer to zero: a box starts at its reference.

    Args:
        box_head: Of four outputs, cxcywh in inverse-sigmoid space.
        size_bias: Output for width and height; -2 makes them 0.12 of the picture where no
            reference box adds its own.
    """
    last = box_head.layers[-1]
    bias = torch.tensor([0.0, 0.0, size_bias, size_bias])
    init.zeros_(last.weight)
    init.copy_(last.bias, bias.to(last.bias))


def init_feature_projection(projection: "nn.Module") -> None:
    """Give the convolutions of feature levels Xavier weights and biases of 0.

    As the authors of Deformable DETR and of Anchor DETR do in their code.

    Args:
        projection: Its ``levels`` are pairs of a convolution and a norm.
    """
    for convolution, _ in projection.levels:
        init.xavier_uniform_(convolution.weight)
        init.zeros_(convolution.bias)


def init_feature_pyramid(pyramid: "FeaturePyramid") -> None:
    """Give a feature pyramid its initial values.

    Uniform weights of variance 1 / fan-in (Kaiming's rule for a linear function, arXiv:1502.01852),
    biases 0, as in the code of Sparse R-CNN's authors.

    Args:
        pyramid: The layer to initialise.
    """
    for convolution in (
        *pyramid.lateral_projections,
        *pyramid.output_convolutions,
        *pyramid.extra_convolutions,
    ):
        init.kaiming_uniform_(convolution.weight, a=1)
        init.zeros_(convolution.bias)


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
    # On the CPU, because some devices have no float64.
    heads = torch.arange(module.num_heads, dtype=torch.float64, device="cpu")
    angles = heads * (2.0 * math.pi / module.num_heads)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, module.num_points + 1, dtype=torch.float64, device="cpu")
    # (heads, levels, points, 2)
    offsets = directions[:, None, None] * steps[:, None]
    return offsets.expand(-1, module.num_levels, -1, -1).flatten().to(bias)
