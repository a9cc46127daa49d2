import math

import pytest
import torch

from hf_querydet.ops.multilevel_roi_align import multilevel_roi_align

SIZES = [(2, 3, 7, 9), (2, 3, 4, 5)]
STRIDES = [4.0, 8.0]
# Picture, then corners in pixels: inside, beyond the border, far outside, of no size, of one cell.
ROIS = [
    [0, 3.0, 5.0, 30.0, 21.0],
    [1, -9.0, -3.5, 17.0, 40.0],
    [1, 60.0, 1.0, 90.0, 11.0],
    [0, 12.0, 9.0, 12.0, 9.0],
    [0, 8.0, 8.0, 12.0, 12.0],
]
LEVELS = [1, 0, 1, 0, 0]


def maps(requires_grad=False):
    return [torch.randn(size, dtype=torch.float64, requires_grad=requires_grad) for size in SIZES]


def pool(levels, level_indices=LEVELS, output_size=3):
    return multilevel_roi_align(
        levels,
        torch.tensor(ROIS, dtype=torch.float64),
        torch.tensor(level_indices),
        strides=STRIDES,
        output_size=output_size,
        sampling_ratio=2,
    )


def bilinear(channel, y, x):
    """Value at a point by the definition: 0 beyond one cell outside, border cells continued."""
    height, width = channel.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    value = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            share = max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column))
            if share > 0:
                value += share * channel[row, column].item()
    return value


def loop_oracle(levels, output_size):
    pooled = torch.zeros(len(ROIS), SIZES[0][1], output_size, output_size, dtype=torch.float64)
    for box, (picture, *corners) in enumerate(ROIS):
        level = LEVELS[box]
        left, top, right, bottom = (corner / STRIDES[level] - 0.5 for corner in corners)
        bin_width, bin_height = (right - left) / output_size, (bottom - top) / output_size
        for channel in range(SIZES[0][1]):
            features = levels[level][picture, channel]
            for row in range(output_size):
                for column in range(output_size):
                    pooled[box, channel, row, column] = sum(
                        bilinear(
                            features,
                            top + (row + (i + 0.5) / 2) * bin_height,
                            left + (column + (j + 0.5) / 2) * bin_width,
                        )
                        / 4
                        for i in range(2)
                        for j in range(2)
                    )
    return pooled


@pytest.mark.parametrize("output_size", [1, 3])
def test_each_box_is_the_mean_of_its_samples_on_its_level(output_size):
    levels = maps()
    expected = loop_oracle(levels, output_size)
    torch.testing.assert_close(pool(levels, output_size=output_size), expected)


def test_box_without_a_level_pools_zeros():
    pooled = pool(maps(), level_indices=[-1, 0, 2, 0, 0])
    assert (pooled[[0, 2]] == 0).all()
    assert pooled[1].any()
    assert pooled[4].all()


def test_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(lambda *levels: pool(levels), maps(requires_grad=True))


# The check of torch reads gradients of the copies that it makes of a list's tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operator_keeps_the_contract_of_registered_operators():
    rois = torch.tensor(ROIS, dtype=torch.float64)
    scales = [1 / stride for stride in STRIDES]
    arguments = (maps(requires_grad=True), rois, torch.tensor(LEVELS), scales, 3, 2)
    torch.library.opcheck(torch.ops.hf_querydet.multilevel_roi_align.default, arguments)


@pytest.mark.cuda
def test_gpu_equals_cpu():
    levels = [features.float() for features in maps()]
    rois, indices = torch.tensor(ROIS), torch.tensor(LEVELS)
    options = {"strides": STRIDES, "output_size": 3, "sampling_ratio": 2}
    expected = multilevel_roi_align(levels, rois, indices, **options)
    on_gpu = multilevel_roi_align(
        [features.cuda() for features in levels], rois.cuda(), indices.cuda(), **options
    )
    torch.testing.assert_close(on_gpu.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_other_number_of_strides_is_an_error():
    with pytest.raises(ValueError, match="strides must be one per level, got 1 for 2"):
        multilevel_roi_align(
            maps(), torch.zeros(1, 5), torch.zeros(1), strides=[4], output_size=3, sampling_ratio=2
        )
