import pytest
import torch
from torch.nn import functional as F

from hf_querydet.layers.projection import FeatureProjection, project_features, project_map

CHANNELS = [3, 5, 6]
SIZES = [(9, 14), (5, 7), (3, 4)]


def maps():
    return [torch.randn(2, size, *hw) for size, hw in zip(CHANNELS, SIZES, strict=True)]


def normalise(features):
    """Two channels in each of the 32 groups, over all cells."""
    groups = features.unflatten(1, (32, 2))
    mean = groups.mean((2, 3, 4), keepdim=True)
    variance = groups.var((2, 3, 4), keepdim=True, correction=0)
    return ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)


def test_each_map_has_a_pointwise_projection():
    projection = FeatureProjection(in_channels=CHANNELS, hidden_size=64, num_levels=3)
    inputs = maps()
    for level, output in enumerate(projection(inputs)):
        convolution = projection.levels[level][0]
        expected = torch.einsum("oi,bihw->bohw", convolution.weight[:, :, 0, 0], inputs[level])
        expected = normalise(expected + convolution.bias[:, None, None])
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_extra_levels_start_from_the_raw_last_map_and_continue_from_the_projected():
    projection = FeatureProjection(in_channels=CHANNELS, hidden_size=64, num_levels=5)
    inputs = maps()
    outputs = projection(inputs)
    assert [tuple(level.shape) for level in outputs] == [
        *((2, 64, *hw) for hw in SIZES),
        (2, 64, 2, 2),
        (2, 64, 1, 1),
    ]
    source = inputs[-1]
    for level in (3, 4):
        convolution = projection.levels[level][0]
        source = F.conv2d(source, convolution.weight, convolution.bias, stride=2, padding=1)
        source = normalise(source)
        torch.testing.assert_close(outputs[level], source, rtol=1e-4, atol=1e-4)


def test_more_maps_than_levels_are_an_error():
    with pytest.raises(ValueError, match="num_feature_levels is 2 but the backbone returns 3 maps"):
        FeatureProjection(in_channels=CHANNELS, hidden_size=64, num_levels=2)


def test_channels_that_cannot_be_grouped_are_an_error():
    with pytest.raises(ValueError, match=r"hidden_size must be a multiple of 32, .*got 48"):
        FeatureProjection(in_channels=CHANNELS, hidden_size=48, num_levels=3)


def add_ramp(padding_mask):
    """Stands for a position embedding: the index of the cell, plus 100 where it is padding."""
    cells = padding_mask.flatten(1)
    ramp = torch.arange(cells.shape[1]) + 100.0 * cells
    return ramp[..., None].expand(-1, -1, 64)


def test_features_are_tokens_of_all_levels_with_place_level_and_padding():
    projection = FeatureProjection(in_channels=CHANNELS, hidden_size=64, num_levels=4)
    level_embeddings = torch.nn.Embedding(4, 64)
    inputs = maps()
    pixel_mask = torch.ones(2, 36, 56, dtype=torch.int64)
    pixel_mask[1, 15:] = pixel_mask[1, :, 30:] = 0
    masks = [torch.zeros(2, *hw, dtype=torch.bool) for hw in SIZES]
    for mask, (height, width) in zip(masks, [(4, 8), (3, 4), (2, 3)], strict=True):
        mask[1, height:] = mask[1, :, width:] = True

    features = project_features(
        list(zip(inputs, masks, strict=True)), pixel_mask, projection, add_ramp, level_embeddings
    )

    # Rows 0 and 18, columns 0 and 28 of the pixel mask; not rows 0 and 1 of the coarsest map's.
    masks.append(torch.tensor([[[False, False], [False, False]], [[False, False], [True, True]]]))
    start = 0
    for level, expected in enumerate(projection(inputs)):
        height, width = expected.shape[2:]
        assert features.spatial_shapes[level] == (height, width)
        for row in range(height):
            for column in range(width):
                token = start + row * width + column
                torch.testing.assert_close(features.tokens[:, token], expected[:, :, row, column])
                padded = masks[level][:, row, column]
                assert torch.equal(features.padding_mask[:, token], padded)
                place = row * width + column + 100.0 * padded
                torch.testing.assert_close(
                    features.positions[:, token], place[:, None] + level_embeddings.weight[level]
                )
        start += height * width
    assert features.tokens.shape == (2, start, 64)
    expected_ratios = [[8 / 14, 4 / 9], [4 / 7, 3 / 5], [3 / 4, 2 / 3], [1, 1 / 2]]
    torch.testing.assert_close(features.valid_ratios[1], torch.tensor(expected_ratios))
    torch.testing.assert_close(features.valid_ratios[0], torch.ones(4, 2))


def test_features_without_padding_have_no_mask():
    projection = FeatureProjection(in_channels=CHANNELS, hidden_size=64, num_levels=4)
    level_embeddings = torch.nn.Embedding(4, 64)
    features = project_features(
        [(features, None) for features in maps()], None, projection, add_ramp, level_embeddings
    )
    assert features.padding_mask is None
    torch.testing.assert_close(features.valid_ratios, torch.ones(2, 4, 2))
    assert features.positions.shape == (1, features.tokens.shape[1], 64)


def test_tokens_of_one_map_are_its_cells_with_place_and_mask():
    projection = torch.nn.Conv2d(3, 64, kernel_size=1)
    features, padding_mask = torch.randn(2, 3, 3, 4), torch.zeros(2, 3, 4, dtype=torch.bool)
    padding_mask[1, 2:] = padding_mask[1, :, 1:] = True
    output = project_map((features, padding_mask), projection, add_ramp)
    assert output.map_size == (3, 4)
    assert output.tokens.shape == (2, 12, 64)
    for row in range(3):
        for column in range(4):
            token, padded = 4 * row + column, padding_mask[:, row, column]
            expected = features[:, :, row, column] @ projection.weight[:, :, 0, 0].T
            torch.testing.assert_close(output.tokens[:, token], expected + projection.bias)
            place = (token + 100.0 * padded)[:, None].expand(-1, 64)
            torch.testing.assert_close(output.positions[:, token], place)
            assert torch.equal(output.attention_mask[:, 0, 0, token], ~padded)


def test_one_map_without_padding_has_no_mask_and_one_set_of_positions():
    projection = torch.nn.Conv2d(3, 64, kernel_size=1)
    output = project_map((torch.randn(2, 3, 3, 4), None), projection, add_ramp)
    assert output.attention_mask is None
    torch.testing.assert_close(output.positions, add_ramp(torch.zeros(1, 3, 4)))


def test_positions_of_one_map_have_the_type_of_its_tokens():
    projection = torch.nn.Conv2d(3, 64, kernel_size=1).to(torch.float64)
    features = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    assert project_map((features, None), projection, add_ramp).positions.dtype == torch.float64
