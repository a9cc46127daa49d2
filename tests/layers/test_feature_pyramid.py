import pytest
import torch
from torch.nn import functional as F

from hf_querydet.layers.feature_pyramid import FeaturePyramid

CHANNELS = [3, 5, 6]
SIZES = [(9, 14), (5, 7), (3, 4)]


def maps():
    return [torch.randn(2, size, *hw) for size, hw in zip(CHANNELS, SIZES, strict=True)]


def enlarged(features, height, width):
    """Nearest neighbour by its definition."""
    result = torch.empty(*features.shape[:2], height, width)
    for row in range(height):
        for column in range(width):
            source = row * features.shape[2] // height, column * features.shape[3] // width
            result[:, :, row, column] = features[:, :, source[0], source[1]]
    return result


def test_sums_go_from_coarse_to_fine_and_are_convolved_last():
    pyramid = FeaturePyramid(in_channels=CHANNELS, hidden_size=4)
    inputs = maps()
    levels = pyramid(inputs)
    total = None
    for index in (2, 1, 0):
        lateral = pyramid.lateral_projections[index]
        own = torch.einsum("oi,bihw->bohw", lateral.weight[:, :, 0, 0], inputs[index])
        own = own + lateral.bias[:, None, None]
        total = own if total is None else own + enlarged(total, *SIZES[index])
        output = pyramid.output_convolutions[index]
        expected = F.conv2d(total, output.weight, output.bias, padding=1)
        torch.testing.assert_close(levels[index], expected, rtol=1e-4, atol=1e-4)
    assert len(levels) == 3


def test_extra_levels_follow_the_last_with_a_relu_between_them():
    pyramid = FeaturePyramid(in_channels=CHANNELS, hidden_size=4, num_levels=5)
    levels = pyramid(maps())
    assert [tuple(level.shape[2:]) for level in levels] == [*SIZES, (2, 2), (1, 1)]
    sources = [levels[2], levels[3].clamp(min=0)]
    for source, convolution, level in zip(
        sources, pyramid.extra_convolutions, levels[3:], strict=True
    ):
        expected = F.conv2d(source, convolution.weight, convolution.bias, stride=2, padding=1)
        torch.testing.assert_close(level, expected)


def test_more_maps_than_levels_are_an_error():
    with pytest.raises(ValueError, match="num_levels is 2 but the backbone returns 3 maps"):
        FeaturePyramid(in_channels=CHANNELS, hidden_size=4, num_levels=2)
