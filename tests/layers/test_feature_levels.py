import math

import pytest
import torch

from hf_querydet.layers.feature_levels import (
    cell_centers,
    encoder_proposals,
    flatten_levels,
    level_valid_ratios,
    reference_grid,
)

SHAPES = [(5, 7), (3, 4), (2, 1)]
# Cells (rows, columns) of each level that are picture, in three pictures.
VALID = [[(5, 7), (3, 4), (2, 1)], [(4, 3), (2, 2), (1, 1)], [(1, 6), (1, 3), (1, 1)]]


def padding_masks():
    masks = []
    for level, (height, width) in enumerate(SHAPES):
        mask = torch.ones(len(VALID), height, width, dtype=torch.bool)
        for picture, valid in enumerate(VALID):
            rows, columns = valid[level]
            mask[picture, :rows, :columns] = False
        masks.append(mask)
    return masks


def cells():
    """Level, row and column of every token, in their order."""
    return [
        (level, row, column)
        for level, (height, width) in enumerate(SHAPES)
        for row in range(height)
        for column in range(width)
    ]


def test_tokens_are_row_major_and_levels_follow_one_another():
    levels = [torch.randn(2, 3, *shape) for shape in SHAPES]
    tokens, spatial_shapes = flatten_levels(levels)
    assert spatial_shapes == SHAPES
    assert tokens.shape == (2, 35 + 12 + 2, 3)
    for token, (level, row, column) in enumerate(cells()):
        torch.testing.assert_close(tokens[:, token], levels[level][:, :, row, column])


def test_valid_ratios_are_width_first():
    ratios = level_valid_ratios(padding_masks())
    for picture, valid in enumerate(VALID):
        for level, (rows, columns) in enumerate(valid):
            height, width = SHAPES[level]
            expected = torch.tensor([columns / width, rows / height])
            torch.testing.assert_close(ratios[picture, level], expected)


def test_centers_are_relative_to_the_picture_without_padding():
    centers = cell_centers(SHAPES, level_valid_ratios(padding_masks()))
    for picture, valid in enumerate(VALID):
        for token, (level, row, column) in enumerate(cells()):
            rows, columns = valid[level]
            expected = torch.tensor([(column + 0.5) / columns, (row + 0.5) / rows])
            torch.testing.assert_close(centers[picture, token], expected)


def test_reference_grid_is_the_loop_of_its_definition():
    ratios = level_valid_ratios(padding_masks())
    grid = reference_grid(SHAPES, ratios)
    assert grid.shape == (3, 49, 3, 2)
    for picture in range(len(VALID)):
        for token, (level, row, column) in enumerate(cells()):
            height, width = SHAPES[level]
            for sampled in range(len(SHAPES)):
                x = (column + 0.5) / (ratios[picture, level, 0] * width)
                y = (row + 0.5) / (ratios[picture, level, 1] * height)
                expected = torch.stack(
                    [x * ratios[picture, sampled, 0], y * ratios[picture, sampled, 1]]
                )
                torch.testing.assert_close(grid[picture, token, sampled], expected)


def test_without_padding_a_token_refers_to_its_own_cell():
    grid = reference_grid(SHAPES, torch.ones(1, 3, 2))
    # Row 2, column 3 of the first level, in the units of the second: (3.5 / 7, 2.5 / 5).
    torch.testing.assert_close(grid[0, 2 * 7 + 3, 1], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("has_mask", [True, False])
def test_proposals_are_the_loop_of_their_definition(has_mask):
    masks = padding_masks()
    ratios = level_valid_ratios(masks) if has_mask else torch.ones(3, 3, 2)
    padding_mask = torch.cat([mask.flatten(1) for mask in masks], 1) if has_mask else None
    boxes, is_usable = encoder_proposals(SHAPES, ratios, padding_mask)
    assert boxes.shape == (3, 49, 4)
    for picture, valid in enumerate(VALID):
        for token, (level, row, column) in enumerate(cells()):
            rows, columns = valid[level] if has_mask else SHAPES[level]
            size = 0.05 * 2**level
            box = [(column + 0.5) / columns, (row + 0.5) / rows, size, size]
            torch.testing.assert_close(boxes[picture, token], torch.tensor(box))
            is_padding = has_mask and (row >= rows or column >= columns)
            usable = not is_padding and all(0.01 < value < 0.99 for value in box)
            assert is_usable[picture, token] == usable


def test_proposals_beyond_the_margin_are_not_used():
    # 120 columns: the first centre lies at 0.004; level 5: boxes are 1.6 wide.
    _, is_usable = encoder_proposals([(1, 120)], torch.ones(1, 1, 2), None)
    assert is_usable[0].tolist() == [False, *[True] * 118, False]
    shapes = [(1, 1)] * 6
    boxes, is_usable = encoder_proposals(shapes, torch.ones(1, 6, 2), None)
    assert is_usable[0].tolist() == [True] * 5 + [False]
    assert math.isclose(boxes[0, 5, 2], 1.6, rel_tol=1e-6)


def test_proposals_of_padded_tokens_are_not_used_wherever_they_lie():
    padding_mask = torch.zeros(1, 49, dtype=torch.bool)
    padding_mask[0, 17] = True
    _, is_usable = encoder_proposals(SHAPES, torch.ones(1, 3, 2), padding_mask)
    assert is_usable[0].tolist() == [token != 17 for token in range(49)]
