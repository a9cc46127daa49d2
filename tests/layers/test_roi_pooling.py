import math

import pytest
import torch
import torchvision

from hf_querydet.layers.feature_levels import flatten_levels
from hf_querydet.layers.roi_pooling import assign_levels, pool_regions


def level_by_definition(width, height):
    return min(max(math.floor(4 + math.log2(math.sqrt(width * height) / 224 + 1e-8)), 2), 5)


def test_levels_of_random_boxes_follow_the_definition():
    corners = torch.rand(2, 50, 2, dtype=torch.float64) * 900
    sizes = torch.rand(2, 50, 2, dtype=torch.float64) * 700 + 1
    levels = assign_levels(
        torch.cat([corners, corners + sizes], -1), finest_level=2, coarsest_level=5
    )
    for picture in range(2):
        for box in range(50):
            assert levels[picture, box] == level_by_definition(*sizes[picture, box].tolist())


@pytest.mark.parametrize(
    ("side", "level"),
    [(0, 2), (111.9, 2), (112, 3), (223.9, 3), (224, 4), (447.9, 4), (448, 5), (9000, 5)],
)
def test_level_changes_where_the_side_doubles(side, level):
    box = torch.tensor([0.0, 0.0, side, side])
    assert assign_levels(box, finest_level=2, coarsest_level=5) == level


def test_levels_end_where_the_pyramid_does():
    boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0], [0.0, 0.0, 4000.0, 4000.0]])
    assert assign_levels(boxes, finest_level=3, coarsest_level=7).tolist() == [3, 7]


def test_box_that_is_turned_inside_out_has_no_level():
    boxes = torch.tensor([[5.0, 0.0, 3.0, 9.0], [math.nan, 0.0, 1.0, 1.0]])
    assert assign_levels(boxes, finest_level=2, coarsest_level=5).tolist() == [-1, -1]


def pyramid(dtype=torch.float32):
    return [torch.randn(2, 3, 32 // 2**i, 40 // 2**i, dtype=dtype) for i in range(3)]


# Of level 2 and 3 in both pictures, and none of level 4.
BOXES = torch.tensor(
    [
        [[5.0, 9.0, 60.0, 77.0], [0.0, 0.0, 150.0, 120.0], [30.0, 30.0, 20.0, 50.0]],
        [[-40.0, -20.0, 160.0, 140.0], [1.0, 2.0, 9.0, 7.0], [90.0, 80.0, 170.0, 150.0]],
    ]
)
LEVELS = [[2, 3, None], [3, 2, 2]]


def test_regions_are_torchvisions_on_the_assigned_level_bins_row_by_row():
    levels = pyramid()
    regions = pool_regions(
        *flatten_levels(levels), BOXES, finest_level=2, output_size=3, sampling_ratio=2
    )
    assert regions.shape == (2, 3, 9, 3)
    for picture in range(2):
        for box, level in enumerate(LEVELS[picture]):
            if level is None:
                assert (regions[picture, box] == 0).all()
                continue
            expected = torchvision.ops.roi_align(
                levels[level - 2][picture : picture + 1],
                [BOXES[picture, box : box + 1]],
                output_size=3,
                spatial_scale=1 / 2**level,
                sampling_ratio=2,
                aligned=True,
            )[0]
            for row in range(3):
                for column in range(3):
                    actual = regions[picture, box, 3 * row + column]
                    torch.testing.assert_close(actual, expected[:, row, column])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_maps_are_pooled_as_float32(dtype):
    tokens, spatial_shapes = flatten_levels(pyramid(dtype))
    # Less than half types resolve beyond 128 pixels.
    boxes = BOXES + torch.tensor([0.03, 0.03, 0.03, 0.03])
    regions = pool_regions(tokens, spatial_shapes, boxes, finest_level=2)
    assert regions.dtype == dtype
    expected = pool_regions(tokens.float(), spatial_shapes, boxes, finest_level=2)
    torch.testing.assert_close(regions, expected.to(dtype), rtol=0, atol=0)


def test_maps_get_a_gradient_and_boxes_do_not():
    levels = [features.requires_grad_() for features in pyramid()]
    boxes = BOXES.clone().requires_grad_()
    pool_regions(*flatten_levels(levels), boxes, finest_level=2).square().sum().backward()
    assert boxes.grad is None
    assert [bool(features.grad.any()) for features in levels] == [True, True, False]
