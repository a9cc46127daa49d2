import pytest
import torch
from torch.nn import functional as F

from hf_querydet.layers.projection import FeatureProjection

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
