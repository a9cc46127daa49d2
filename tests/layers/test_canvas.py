import pytest
import torch

from hf_querydet.layers.canvas import pad_canvas, picture_sizes


@pytest.mark.parametrize(
    ("size", "padded"), [((33, 64), (64, 64)), ((31, 1), (32, 32)), ((96, 97), (96, 128))]
)
def test_canvas_grows_to_the_next_multiple_with_zeros(size, padded):
    pixel_values = torch.rand(2, 3, *size) + 1
    canvas = pad_canvas(pixel_values, multiple=32)
    assert canvas.shape == (2, 3, *padded)
    assert torch.equal(canvas[:, :, : size[0], : size[1]], pixel_values)
    assert canvas.count_nonzero() == pixel_values.numel()


def test_sizes_are_width_and_height_of_the_masked_picture():
    pixel_mask = torch.zeros(2, 7, 9, dtype=torch.int64)
    pixel_mask[0, :5, :9] = 1
    pixel_mask[1, :7, :2] = 1
    sizes = picture_sizes(torch.zeros(2, 3, 7, 9), pixel_mask)
    assert sizes.tolist() == [[9, 5], [2, 7]]
    assert sizes.dtype == torch.float32


def test_pictures_without_a_mask_fill_the_canvas():
    assert picture_sizes(torch.zeros(2, 3, 7, 9), None).tolist() == [[9, 7], [9, 7]]


def test_empty_mask_has_a_size_that_can_be_divided_by():
    empty = torch.zeros(1, 7, 9, dtype=torch.int64)
    assert picture_sizes(torch.zeros(1, 3, 7, 9), empty).tolist() == [[1, 1]]
