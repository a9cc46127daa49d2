import math

import pytest
import torch
import torchvision

from hf_querydet.ops.boxes import (
    apply_box_deltas,
    box_area,
    box_iou,
    boxes_cxcywh_to_xyxy,
    boxes_xyxy_to_cxcywh,
    generalized_box_iou,
    inverse_sigmoid,
    place_boxes,
    refine_boxes,
)


def random_boxes_xyxy(*shape: int) -> torch.Tensor:
    corners = torch.rand(*shape, 2, 2, dtype=torch.float64)
    return torch.cat([corners.amin(-2), corners.amax(-2) + 0.01], dim=-1)


def giou_of_two_boxes(box: list[float], other: list[float]) -> tuple[float, float]:
    """IoU and generalised IoU by the definition, on plain numbers."""
    left, top = max(box[0], other[0]), max(box[1], other[1])
    right, bottom = min(box[2], other[2]), min(box[3], other[3])
    intersection = max(right - left, 0) * max(bottom - top, 0)
    area = (box[2] - box[0]) * (box[3] - box[1])
    other_area = (other[2] - other[0]) * (other[3] - other[1])
    union = area + other_area - intersection
    hull_width = max(box[2], other[2]) - min(box[0], other[0])
    hull_height = max(box[3], other[3]) - min(box[1], other[1])
    hull = hull_width * hull_height
    return intersection / union, intersection / union - (hull - union) / hull


def test_cxcywh_box_becomes_its_corners():
    box_cxcywh = torch.tensor([[10.0, 20.0, 4.0, 6.0]])

    corners = boxes_cxcywh_to_xyxy(box_cxcywh)

    assert corners.tolist() == [[8.0, 17.0, 12.0, 23.0]]


def test_corners_become_centre_and_size():
    box_xyxy = torch.tensor([[8.0, 17.0, 12.0, 23.0]])

    assert boxes_xyxy_to_cxcywh(box_xyxy).tolist() == [[10.0, 20.0, 4.0, 6.0]]


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 1)])
def test_formats_agree_with_torchvision_for_any_leading_shape(shape):
    boxes_xyxy = random_boxes_xyxy(*shape)
    flat = boxes_xyxy.reshape(-1, 4)
    expected = torchvision.ops.box_convert(flat, "xyxy", "cxcywh").view(*shape, 4)

    boxes_cxcywh = boxes_xyxy_to_cxcywh(boxes_xyxy)

    torch.testing.assert_close(boxes_cxcywh, expected)
    torch.testing.assert_close(boxes_cxcywh_to_xyxy(boxes_cxcywh), boxes_xyxy)


def test_box_with_swapped_corners_has_no_area():
    # Both sides swapped: the product of two negative sides must not pass as an area.
    boxes_xyxy = torch.tensor([[3.0, 5.0, 1.0, 2.0], [3.0, 2.0, 1.0, 5.0], [1.0, 2.0, 3.0, 5.0]])

    assert box_area(boxes_xyxy).tolist() == [0.0, 0.0, 6.0]


def test_iou_and_giou_of_all_pairs_equal_the_definition():
    boxes, others = random_boxes_xyxy(3), random_boxes_xyxy(5)
    expected = torch.tensor(
        [[giou_of_two_boxes(box, other) for other in others.tolist()] for box in boxes.tolist()],
        dtype=torch.float64,
    )

    torch.testing.assert_close(box_iou(boxes[:, None], others), expected[..., 0])
    torch.testing.assert_close(generalized_box_iou(boxes[:, None], others), expected[..., 1])


def test_giou_agrees_with_torchvision_for_boxes_that_overlap_touch_and_lie_apart():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 3.0], [2.0, 0.0, 4.0, 3.0], [5.0, 6.0, 8.0, 7.0]])
    others = torch.cat([boxes, torch.tensor([[1.0, 1.0, 6.0, 2.0]])])
    expected = torchvision.ops.generalized_box_iou(boxes, others)

    torch.testing.assert_close(generalized_box_iou(boxes[:, None], others), expected)


def test_overlaps_of_paired_boxes_are_the_diagonal_of_all_pairs():
    boxes, others = random_boxes_xyxy(5), random_boxes_xyxy(5)
    all_pairs = torchvision.ops.generalized_box_iou(boxes, others)

    torch.testing.assert_close(generalized_box_iou(boxes, others), all_pairs.diagonal())


@pytest.mark.parametrize(
    ("box", "other", "iou", "giou"),
    [
        # Two points apart: no union, and a hull of which nothing is covered.
        ([1.0, 1.0, 1.0, 1.0], [3.0, 2.0, 3.0, 2.0], 0.0, -1.0),
        # One point twice: neither union nor hull.
        ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], 0.0, 0.0),
        # A point inside a box: hull and union are both the box.
        ([0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0], 0.0, 0.0),
        # Two collinear segments: a hull without area.
        ([0.0, 1.0, 2.0, 1.0], [5.0, 1.0, 6.0, 1.0], 0.0, 0.0),
    ],
)
def test_boxes_without_area_have_finite_overlaps_and_gradients(box, other, iou, giou):
    box = torch.tensor(box, requires_grad=True)
    other = torch.tensor(other, requires_grad=True)

    values = box_iou(box, other), generalized_box_iou(box, other)
    (values[0] + values[1]).backward()

    assert [value.item() for value in values] == [iou, giou]
    assert box.grad.isfinite().all()
    assert other.grad.isfinite().all()


def test_giou_gradient_is_that_of_finite_differences():
    boxes = random_boxes_xyxy(4).requires_grad_()
    others = random_boxes_xyxy(4).requires_grad_()

    assert torch.autograd.gradcheck(generalized_box_iou, (boxes, others))


def test_inverse_sigmoid_is_the_logit():
    probability = [0.03, 0.2, 0.5, 0.77]
    expected = [math.log(p / (1 - p)) for p in probability]

    logits = inverse_sigmoid(torch.tensor(probability, dtype=torch.float64))

    torch.testing.assert_close(logits, torch.tensor(expected, dtype=torch.float64))


def test_inverse_sigmoid_bounds_numerator_and_denominator_each_by_eps():
    probability = torch.tensor([-0.5, 0.0, 1e-7, 1.0, 1.5], dtype=torch.float64)
    # Below: log(eps / (1 - p)), with the untouched 1 - p; not log(eps / (1 - eps)).
    low, almost_low = math.log(1e-5), math.log(1e-5 / (1 - 1e-7))
    expected = torch.tensor([low, low, almost_low, -low, -low], dtype=torch.float64)

    # The two candidates differ by 1e-5; this tolerance tells them apart.
    torch.testing.assert_close(inverse_sigmoid(probability), expected, rtol=0, atol=1e-9)


def test_zero_deltas_keep_the_reference_boxes():
    reference_boxes = torch.rand(2, 5, 4) * 0.98 + 0.01

    refined = refine_boxes(torch.zeros(2, 5, 4), reference_boxes)

    torch.testing.assert_close(refined, reference_boxes)


def test_refined_box_is_the_sigmoid_of_delta_plus_logit():
    delta, reference = [0.3, -1.2, 4.0, -0.7], [0.25, 0.6, 0.9, 0.05]
    # sigmoid(d + log(r / (1 - r))) = r e^d / (r e^d + 1 - r)
    expected = [
        r * math.exp(d) / (r * math.exp(d) + 1 - r) for d, r in zip(delta, reference, strict=True)
    ]

    refined = refine_boxes(torch.tensor([[delta]]), torch.tensor([[reference]]))

    torch.testing.assert_close(refined, torch.tensor([[expected]]))


def test_refinement_refuses_reference_points():
    with pytest.raises(ValueError, match=r"same shape, got \(2, 5, 4\) and \(2, 5, 2\)"):
        refine_boxes(torch.zeros(2, 5, 4), torch.zeros(2, 5, 2))


def test_placed_box_is_relative_to_the_point_in_its_centre_only():
    delta, point = [0.3, -1.2, 4.0, -0.7], [0.25, 0.6]
    centre = [
        r * math.exp(d) / (r * math.exp(d) + 1 - r) for d, r in zip(delta[:2], point, strict=True)
    ]
    expected = [*centre, *(1 / (1 + math.exp(-d)) for d in delta[2:])]

    placed = place_boxes(torch.tensor([[delta]]), torch.tensor([[point]]))

    torch.testing.assert_close(placed, torch.tensor([[expected]]))


def test_zero_deltas_keep_the_reference_points_as_centres():
    points = torch.rand(2, 5, 2) * 0.9 + 0.05
    placed = place_boxes(torch.zeros(2, 5, 4), points)
    torch.testing.assert_close(placed[..., :2], points)


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 4, 2)])
def test_placing_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"of 4 and of 2, got \(2, 5, 4\) and \(2, "):
        place_boxes(torch.zeros(2, 5, 4), torch.zeros(shape))


def deltas_by_definition(deltas, box):
    """The refined box in plain numbers."""
    limit = math.log(100_000 / 16)
    width, height = box[2] - box[0], box[3] - box[1]
    cx = box[0] + width / 2 + deltas[0] / 2 * width
    cy = box[1] + height / 2 + deltas[1] / 2 * height
    width *= math.exp(min(deltas[2], limit))
    height *= math.exp(min(deltas[3], limit))
    return [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]


def test_deltas_move_and_scale_each_box():
    boxes = 100 * random_boxes_xyxy(2, 5)
    deltas = torch.randn(2, 5, 4, dtype=torch.float64) * 3
    deltas[0, 0, 2] = 12.0
    deltas[1, 2, 3] = -12.0
    refined = apply_box_deltas(deltas, boxes)
    for picture in range(2):
        for box in range(5):
            expected = deltas_by_definition(
                deltas[picture, box].tolist(), boxes[picture, box].tolist()
            )
            torch.testing.assert_close(refined[picture, box], torch.tensor(expected).double())


def test_deltas_agree_with_the_authors_numbers():
    deltas = torch.tensor([[1.0, -2.0, 0.5, -0.3], [0.0, 0.0, 20.0, 20.0]])
    boxes = torch.tensor([[10.0, 20.0, 110.0, 70.0], [0.0, 0.0, 2.0, 4.0]])
    expected = torch.tensor(
        [
            [27.563942, -23.520454, 192.436066, 13.520454],
            [-6248.998, -12497.996, 6250.998, 12501.996],
        ]
    )
    torch.testing.assert_close(apply_box_deltas(deltas, boxes), expected)


def test_zero_deltas_keep_the_box():
    boxes = torch.tensor([[3.0, 4.0, 11.0, 10.0], [-7.0, 2.0, 900.0, 3.0]])
    torch.testing.assert_close(apply_box_deltas(torch.zeros(2, 4), boxes), boxes, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_deltas_move_pixels_in_float32(dtype):
    deltas = torch.tensor([[0.5, 0.25, 0.0, 0.0]], dtype=dtype)
    boxes = torch.tensor([[1001.0, 2003.0, 1005.0, 2011.0]])
    refined = apply_box_deltas(deltas, boxes)
    assert refined.tolist() == [[1002.0, 2004.0, 1006.0, 2012.0]]


def test_box_deltas_of_another_shape_are_an_error():
    with pytest.raises(ValueError, match=r"same shape, got \(2, 4\) and \(3, 4\)"):
        apply_box_deltas(torch.zeros(2, 4), torch.zeros(3, 4))
