"""From the maps of a backbone to tokens of one width: of one map, or of several feature levels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_querydet.layers.attention import attention_mask_from_padding
from hf_querydet.layers.backbone import resize_padding_mask
from hf_querydet.layers.feature_levels import flatten_levels, level_valid_ratios

NUM_GROUPS = 32  # of the authors


@dataclass(frozen=True)
class MapFeatures:
    """One feature map of a batch as a sequence, ready for a transformer encoder.

    Attributes:
        tokens: (batch, num_tokens, hidden_size).
        positions: Embeddings of their places, the same shape or with a batch of 1.
        attention_mask: (batch, 1, 1, num_tokens), True = attend; None if nothing is padded.
        map_size: (height, width) of the map.
    """

    tokens: Tensor
    positions: Tensor
    attention_mask: Tensor | None
    map_size: tuple[int, int]


def project_map(
    stage: tuple[Tensor, Tensor | None],
    projection: nn.Conv2d,
    position_embedding: Callable[[Tensor], Tensor],
) -> MapFeatures:
    """Turn one map of a backbone into tokens.

    DETR (arXiv:2005.12872), Sec. 3.2, "Transformer encoder".

    Args:
        stage: Of the backbone, a map (batch, channels, height, width) and its padding mask
            (batch, height, width), which is None if nothing is padded.
        projection: 1x1, to hidden_size channels.
        position_embedding: From a padding mask to (batch, height * width, hidden_size).
    """
    features, padding_mask = stage
    if padding_mask is None:
        attention_mask = None
        padding_mask = torch.zeros_like(features[:1, 0], dtype=torch.bool)
    else:
        attention_mask = attention_mask_from_padding(padding_mask.flatten(1))
    tokens = projection(features).flatten(2).transpose(1, 2)
    positions = position_embedding(padding_mask).to(tokens.dtype)
    return MapFeatures(tokens, positions, attention_mask, tuple(features.shape[-2:]))


class FeatureProjection(nn.Module):
    """Convolution and group normalisation per level, and levels coarser than the backbone's.

    Each map gets a 1x1 convolution. The first extra level is a 3x3 convolution of stride 2 over the
    backbone's own last map, not over its projection; further ones continue from the level before.
    Deformable DETR (arXiv:2010.04159), Sec. A.2 and Fig. 4.

    Group normalisation takes its statistics from the whole map, padding included, as in the
    authors' code.

    Args:
        in_channels: Channels of the backbone's maps, fine to coarse.
        hidden_size: Channels of every level; a multiple of 32, the number of groups.
        num_levels: Levels in all.

    Raises:
        ValueError: If there are more maps than levels, or hidden_size cannot be split into groups.
    """

    def __init__(self, *, in_channels: Sequence[int], hidden_size: int, num_levels: int) -> None:
        super().__init__()
        if len(in_channels) > num_levels:
            raise ValueError(
                f"num_feature_levels is {num_levels} but the backbone returns {len(in_channels)} "
                "maps; set out_indices of backbone_config to the stages that are to be read."
            )
        if hidden_size % NUM_GROUPS:
            raise ValueError(
                f"hidden_size must be a multiple of {NUM_GROUPS}, the groups of the normalisation, "
                f"got {hidden_size}."
            )
        convolutions = [nn.Conv2d(size, hidden_size, kernel_size=1) for size in in_channels]
        size_in = in_channels[-1]
        for _ in range(num_levels - len(in_channels)):
            convolutions.append(nn.Conv2d(size_in, hidden_size, 3, stride=2, padding=1))
            size_in = hidden_size
        self.num_maps = len(in_channels)
        self.levels = nn.ModuleList(
            nn.Sequential(convolution, nn.GroupNorm(NUM_GROUPS, hidden_size))
            for convolution in convolutions
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Project maps.

        Args:
            maps: Of the backbone, each (batch, channels, height, width).

        Returns:
            ``num_levels`` maps (batch, hidden_size, height, width), fine to coarse.
        """
        levels = [project(features) for project, features in zip(self.levels, maps, strict=False)]
        source = maps[-1]
        for project in self.levels[self.num_maps :]:
            source = project(source)
            levels.append(source)
        return levels


@dataclass(frozen=True)
class LevelFeatures:
    """All feature levels of a batch as one sequence, ready for a deformable encoder.

    Attributes:
        tokens: (batch, num_tokens, hidden_size).
        positions: Embeddings of place and level, broadcastable to the same shape.
        padding_mask: (batch, num_tokens), True = padding; None if nothing is padded.
        spatial_shapes: (height, width) of every level.
        valid_ratios: See :func:`~hf_querydet.layers.feature_levels.level_valid_ratios`.
    """

    tokens: Tensor
    positions: Tensor
    padding_mask: Tensor | None
    spatial_shapes: list[tuple[int, int]]
    valid_ratios: Tensor


def project_features(
    stages: Sequence[tuple[Tensor, Tensor | None]],
    pixel_mask: Tensor | None,
    projection: FeatureProjection,
    position_embedding: Callable[[Tensor], Tensor],
    level_embeddings: nn.Embedding | None,
) -> LevelFeatures:
    """Turn the maps of a backbone into tokens of all levels.

    Deformable DETR (arXiv:2010.04159), Sec. 4.1 and A.2.

    Args:
        stages: Of the backbone, each a map (batch, channels, height, width) and its padding mask
            (batch, height, width), which is None if nothing is padded.
        pixel_mask: (batch, height, width), 1 = picture, 0 = padding; read where ``stages`` have
            masks.
        projection: Makes the levels.
        position_embedding: From a padding mask to (batch, height * width, hidden_size).
        level_embeddings: A vector per level, added to its positions; None adds nothing.
    """
    levels = projection([features for features, _ in stages])
    masks = [mask for _, mask in stages]
    tokens, spatial_shapes = flatten_levels(levels)
    if masks[0] is None:
        padding_mask = None
        valid_ratios = torch.ones(
            tokens.shape[0], len(levels), 2, device=tokens.device, dtype=torch.float32
        )
        masks = [torch.zeros_like(level[:1, 0], dtype=torch.bool) for level in levels]
    else:
        # Extra levels take theirs from the picture's full mask, not from the coarsest map's.
        masks += [resize_padding_mask(pixel_mask, level) for level in levels[len(masks) :]]
        padding_mask = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        valid_ratios = level_valid_ratios(masks)
    positions = [position_embedding(mask) for mask in masks]
    if level_embeddings is not None:
        positions = [
            of_level + level_embedding
            for of_level, level_embedding in zip(positions, level_embeddings.weight, strict=True)
        ]
    return LevelFeatures(
        tokens,
        torch.cat(positions, dim=1).to(tokens.dtype),
        padding_mask,
        spatial_shapes,
        valid_ratios,
    )
