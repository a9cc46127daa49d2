import copy

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from hf_querydet.data import DetectionAugmentation
from hf_querydet.data.transforms import (
    RandomShortestEdge,
    RandomSizeCrop,
    apply_transforms,
)
from hf_querydet.image_processing_utils import DetectionImageProcessor


def annotation_set(*annotations):
    return {"image_id": 3, "annotations": list(annotations)}


def annotation(bbox, area=None, label=0, iscrowd=0):
    return {"bbox": bbox, "category_id": label, "area": area, "iscrowd": iscrowd}


def image_of_places(width, height):
    """A picture whose red and green values are the column and the row of each pixel."""
    red = torch.arange(width).expand(height, width)
    green = torch.arange(height)[:, None].expand(height, width)
    return torch.stack([red, green, torch.zeros_like(red)]).to(torch.uint8)


def crop(top, left, height, width):
    def transforms(picture, target):
        boxes = v2.functional.crop(target["boxes"], top, left, height, width)
        return v2.functional.crop(picture, top, left, height, width), {**target, "boxes": boxes}

    return transforms


def test_without_a_change_annotations_come_back():
    before = annotation_set(
        annotation([5.0, 4.0, 20.0, 11.0], 130.0, label=2), annotation([0.5, 1.25, 3.0, 2.0])
    )

    picture, after = apply_transforms(lambda *inputs: inputs, image_of_places(61, 43), before)

    assert picture.shape == (3, 43, 61)
    assert picture.dtype == torch.uint8
    assert type(picture) is torch.Tensor
    assert after["image_id"] == 3
    first, second = after["annotations"]
    assert first["bbox"] == [5.0, 4.0, 20.0, 11.0]
    assert first["area"] == pytest.approx(130)
    assert (first["category_id"], first["iscrowd"]) == (2, 0)
    assert second["bbox"] == [0.5, 1.25, 3.0, 2.0]
    assert second["area"] == pytest.approx(6)


def test_boxes_follow_a_flip():
    _, after = apply_transforms(
        v2.RandomHorizontalFlip(1.0),
        image_of_places(61, 43),
        annotation_set(annotation([5.0, 4.0, 20.0, 11.0], 130.0)),
    )

    assert after["annotations"][0]["bbox"] == [61 - 25, 4.0, 20.0, 11.0]
    assert after["annotations"][0]["area"] == pytest.approx(130)


def test_a_crop_clips_boxes_drops_those_outside_and_computes_areas_anew():
    before = annotation_set(
        annotation([5.0, 4.0, 20.0, 10.0], label=1),  # x 5-25, y 4-14: a quarter stays
        annotation([5.0, 4.0, 20.0, 10.0], 80.0, label=2, iscrowd=1),  # the same, with a mask
        annotation([40.0, 4.0, 6.0, 6.0], label=3),  # right of the crop
        annotation([30.0, 20.0, 5.0, 5.0], label=4),  # touches its corner only
        annotation([16.0, 12.0, 3.0, 4.0], 7.0, label=5),  # inside
    )

    picture, after = apply_transforms(crop(9, 15, 11, 15), image_of_places(61, 43), before)

    assert picture[:2, 0, 0].tolist() == [15, 9]
    boxes = {each["category_id"]: each["bbox"] for each in after["annotations"]}
    areas = {each["category_id"]: each["area"] for each in after["annotations"]}
    assert boxes == {
        1: [0.0, 0.0, 10.0, 5.0],
        2: [0.0, 0.0, 10.0, 5.0],
        5: [1.0, 3.0, 3.0, 4.0],
    }
    # A quarter of the box, and so a quarter of the mask.
    assert areas == {1: pytest.approx(50), 2: pytest.approx(20), 5: pytest.approx(7)}
    assert [each["iscrowd"] for each in after["annotations"]] == [0, 1, 0]


def test_a_crop_may_leave_no_object():
    before = annotation_set(annotation([40.0, 4.0, 6.0, 6.0]))

    _, after = apply_transforms(crop(0, 0, 11, 15), image_of_places(61, 43), before)

    assert after == {"image_id": 3, "annotations": []}


def test_boxes_that_stick_out_or_have_no_area_are_clipped_and_dropped():
    before = annotation_set(
        annotation([-5.0, 40.0, 10.0, 8.0], label=1), annotation([9.0, 9.0, 0.0, 4.0], 3.0, label=2)
    )

    _, after = apply_transforms(lambda *inputs: inputs, image_of_places(61, 43), before)

    (only,) = after["annotations"]
    assert only["bbox"] == [0.0, 40.0, 5.0, 3.0]


def test_a_picture_without_annotations_passes_through_everything():
    processor = DetectionImageProcessor(size={"shortest_edge": 40, "longest_edge": 60})
    for _ in range(4):
        _, after = apply_transforms(
            DetectionAugmentation(processor), image_of_places(61, 43), annotation_set()
        )
        assert after["annotations"] == []


def test_transforms_that_drop_boxes_alone_are_an_error():
    def transforms(picture, target):
        return picture, {**target, "boxes": target["boxes"][:1]}

    before = annotation_set(annotation([1.0, 2.0, 3.0, 4.0]), annotation([5.0, 4.0, 3.0, 4.0]))
    with pytest.raises(ValueError, match="transforms must keep one value per box, got"):
        apply_transforms(transforms, image_of_places(61, 43), before)


@pytest.mark.parametrize(
    ("size", "edge", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1066)),  # 1066.67 is truncated
        ((200, 500), 800, 1333, (533, 1332)),  # the longer side from the rounded shorter one
        ((500, 200), 480, 1333, (1200, 480)),
        ((43, 61), 400, None, (400, 567)),
    ],
)
def test_sizes_are_those_of_the_authors(size, edge, longest, expected):
    picture = tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8))

    assert RandomShortestEdge([edge], longest)(picture).shape[-2:] == expected


def test_boxes_are_resized_with_the_picture():
    boxes = tv_tensors.BoundingBoxes(
        [[10.0, 20.0, 30.0, 40.0]], format="XYXY", canvas_size=(50, 80)
    )
    picture = tv_tensors.Image(torch.zeros(3, 50, 80, dtype=torch.uint8))

    _, resized = RandomShortestEdge([75])(picture, boxes)

    assert resized.tolist() == [[15.0, 30.0, 45.0, 60.0]]
    assert resized.canvas_size == (75, 120)


def test_crop_sides_are_uniform_between_their_bounds():
    torch.manual_seed(0)
    picture = tv_tensors.Image(torch.zeros(3, 9, 40, dtype=torch.uint8))
    shapes = [tuple(RandomSizeCrop(6, 12)(picture).shape[-2:]) for _ in range(600)]

    # Height is limited by the picture; width by the largest crop. Both bounds are reached.
    assert {height for height, _ in shapes} == {6, 7, 8, 9}
    assert {width for _, width in shapes} == set(range(6, 13))
    assert {height != width for height, width in shapes} == {True, False}


def test_crops_reach_every_corner():
    torch.manual_seed(0)
    picture = tv_tensors.Image(image_of_places(10, 8))
    corners = {tuple(RandomSizeCrop(7, 7)(picture)[:2, 0, 0].tolist()) for _ in range(200)}

    assert corners == {(left, top) for left in range(4) for top in range(2)}


def test_a_picture_smaller_than_the_crop_keeps_its_side():
    picture = tv_tensors.Image(torch.zeros(3, 5, 30, dtype=torch.uint8))

    assert RandomSizeCrop(9, 9)(picture).shape[-2:] == (5, 9)


def drawn_shapes(augmentation, count=300):
    torch.manual_seed(0)
    image = image_of_places(240, 120)
    return [apply_transforms(augmentation, image, annotation_set())[0].shape for _ in range(count)]


def test_scales_are_those_of_the_paper_in_proportion():
    processor = DetectionImageProcessor(size={"shortest_edge": 200, "longest_edge": 333})
    augmentation = DetectionAugmentation(processor)
    shapes = drawn_shapes(augmentation)

    # A quarter of 480, 512, ..., 800; the limit of 333 makes 167 of everything above it.
    whole = {height for _, height, width in shapes if width in (2 * height, 2 * height - 1)}
    assert whole >= {120, 128, 136, 144, 152, 160, 166}
    assert max(max(shape) for shape in shapes) <= 334
    assert min(min(shape[1:]) for shape in shapes) >= 99
    assert augmentation.resizes


def test_half_of_the_pictures_are_cropped_and_half_are_mirrored():
    processor = DetectionImageProcessor(size={"height": 60, "width": 120})
    augmentation = DetectionAugmentation(processor)
    torch.manual_seed(0)
    image = image_of_places(240, 120)
    pictures = [apply_transforms(augmentation, image, annotation_set())[0] for _ in range(300)]

    # A fixed size is left to the processor, so the whole picture keeps its own here.
    assert not augmentation.resizes
    whole = [picture for picture in pictures if picture.shape == (3, 120, 240)]
    mirrored = [picture for picture in pictures if picture[0, 0, 0] > picture[0, 0, -1]]
    assert 110 < len(whole) < 190
    assert 110 < len(mirrored) < 190
    # 384/800 to 600/800 of the processor's shorter side.
    cropped = [picture.shape[1:] for picture in pictures if picture.shape != (3, 120, 240)]
    assert {side for shape in cropped for side in shape} <= set(range(28, 46))


def test_augmentation_can_leave_left_and_right():
    processor = DetectionImageProcessor(size={"height": 60, "width": 120})
    augmentation = DetectionAugmentation(processor, flip_probability=0.0)
    torch.manual_seed(0)
    image = image_of_places(240, 120)

    for _ in range(50):
        picture, _ = apply_transforms(augmentation, image, annotation_set())
        assert picture[0, 0, 0] < picture[0, 0, -1]


def test_scale_and_crop_can_be_left_out():
    processor = DetectionImageProcessor(size={"shortest_edge": 200, "longest_edge": 500})
    one_scale = DetectionAugmentation(processor, multi_scale=False)
    uncropped = DetectionAugmentation(processor, random_crop=False)

    # The processor resizes; only what was cropped has another size here.
    assert not one_scale.resizes
    shapes = set(drawn_shapes(one_scale, count=60))
    assert (3, 120, 240) in shapes
    assert len(shapes) > 10
    assert uncropped.resizes
    heights = {height for _, height, width in drawn_shapes(uncropped, count=200)}
    assert heights == set(range(120, 201, 8))


def test_augmented_pictures_fit_into_pad_size():
    processor = DetectionImageProcessor(
        size={"shortest_edge": 200, "longest_edge": 333}, pad_size={"height": 150, "width": 190}
    )

    for _, height, width in drawn_shapes(DetectionAugmentation(processor), count=60):
        assert height <= 150
        assert width <= 190


def test_boxes_stay_on_what_they_enclose():
    """A red rectangle is found again, to a pixel, where its box says."""
    processor = DetectionImageProcessor(size={"shortest_edge": 300, "longest_edge": 500})
    augmentation = DetectionAugmentation(processor)
    image = torch.zeros(3, 170, 210, dtype=torch.uint8)
    image[0, 50:120, 60:130] = 255
    before = annotation_set(annotation([60.0, 50.0, 70.0, 70.0]))
    torch.manual_seed(0)
    found = 0
    for _ in range(40):
        picture, after = apply_transforms(augmentation, image, copy.deepcopy(before))
        for each in after["annotations"]:
            left, top, width, height = each["bbox"]
            rows, columns = (picture[0] > 127).nonzero().unbind(1)
            edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            expected = torch.tensor([left, top, left + width, top + height])
            torch.testing.assert_close(torch.stack(edges).float(), expected, atol=1.0, rtol=0)
            assert each["area"] == pytest.approx(width * height, rel=1e-5)
            found += 1
    assert found > 25
