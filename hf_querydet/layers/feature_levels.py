"""Several feature levels as one sequence of tokens, and where each token lies.

Tokens of a level are row-major, levels follow one another from fine to coarse.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SpatialShapes = Sequence[tuple[int, int]]

# Deformable DETR (arXiv:2010.04159), Sec. A.4.
FINEST_PROPOSAL_SIZE = 0.05
PROPOSAL_MARGIN = 0.01


def flatten_levels(levels: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Turn maps into tokens.

    Args:
        levels: Each (batch, channels, height, width).

    Returns:
        Tokens (batch, num_tokens, channels), and (height, width) of every level.
    """
    # Channels side by side, as maps with channels last have them and attention reads them.
    tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
    return tokens, [(level.shape[-2], level.shape[-1]) for level in levels]


def level_valid_ratios(padding_masks: Sequence[Tensor]) -> Tensor:
    """Share of each level that is picture.

    Counted along the first row and the first column: padding lies at the right and at the bottom.

    Args:
        padding_masks: Per level (batch, height, width), True = padding.

    Returns:
        (batch, num_levels, 2), (width, height), float32 in (0, 1].
    """
    ratios = [
        torch.stack([(~mask[:, 0, :]).float().mean(1), (~mask[:, :, 0]).float().mean(1)], dim=-1)
        for mask in padding_masks
    ]
    return torch.stack(ratios, dim=1)


def cell_centers(spatial_shapes: SpatialShapes, valid_ratios: Tensor) -> Tensor:
    """Centre of every cell, relative to the unpadded picture; beyond 1 on padding.

    Args:
        spatial_shapes: (height, width) of every level.
        valid_ratios: See :func:`level_valid_ratios`.

    Returns:
        (batch, num_tokens, 2), normalised (x, y), float32.
    """
    centers = []
    for level, (height, width) in enumerate(spatial_shapes):
        rows = torch.arange(height, device=valid_ratios.device, dtype=valid_ratios.dtype)
        columns = torch.arange(width, device=valid_ratios.device, dtype=valid_ratios.dtype)
        # (batch, cells of one side)
        x = (columns + 0.5) / (valid_ratios[:, level, 0, None] * width)
        y = (rows + 0.5) / (valid_ratios[:, level, 1, None] * height)
        grid = torch.stack(
            [x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1
        )
        centers.append(grid.flatten(1, 2))
    return torch.cat(centers, dim=1)


def reference_grid(spatial_shapes: SpatialShapes, valid_ratios: Tensor) -> Tensor:
    """Reference points of the encoder: each token looks around its own place in every level.

    Deformable DETR (arXiv:2010.04159), Sec. 4.1. The place is relative to the picture; times the
    valid ratio of a level it is relative to that level's padded map.

    Args:
        spatial_shapes: (height, width) of every level.
        valid_ratios: See :func:`level_valid_ratios`.

    Returns:
        (batch, num_tokens, num_levels, 2), normalised (x, y) in each level, float32.
    """
    return cell_centers(spatial_shapes, valid_ratios)[:, :, None] * valid_ratios[:, None]


def encoder_proposals(
    spatial_shapes: SpatialShapes, valid_ratios: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One box per token, around its cell, from which a two-stage detector starts.

    Deformable DETR (arXiv:2010.04159), Sec. A.4: side 0.05, twice as large on each coarser level.

    Args:
        spatial_shapes: (height, width) of every level.
        valid_ratios: See :func:`level_valid_ratios`.
        padding_mask: (batch, num_tokens), True = padding; None if nothing is padded.

    Returns:
        Boxes (batch, num_tokens, 4), cxcywh relative to the unpadded picture, float32. And which of
        them can be used, (batch, num_tokens): not on padding, and every coordinate strictly between
        0.01 and 0.99.
    """
    centers = cell_centers(spatial_shapes, valid_ratios)
    sizes = torch.cat(
        [
            centers.new_full((height * width,), FINEST_PROPOSAL_SIZE * 2.0**level)
            for level, (height, width) in enumerate(spatial_shapes)
        ]
    )
    boxes_cxcywh = torch.cat([centers, sizes[:, None].expand_as(centers)], dim=-1)
    inside = (boxes_cxcywh > PROPOSAL_MARGIN) & (boxes_cxcywh < 1 - PROPOSAL_MARGIN)
    is_usable = inside.all(-1)
    if padding_mask is not None:
        is_usable = is_usable & ~padding_mask
    return boxes_cxcywh, is_usable
