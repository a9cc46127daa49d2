import numpy as np
import pytest
import torch

from hf_querydet.coco_annotations import match_annotations, prepare_labels

HEIGHT, WIDTH = 50, 80


def labels_of(*annotations, image_id=7, original_size=(HEIGHT, WIDTH), resized_size=None, **kwargs):
    return prepare_labels(
        {"image_id": image_id, "annotations": list(annotations)},
        original_size=original_size,
        resized_size=resized_size or original_size,
        **kwargs,
    )


def box(*bbox, **others):
    return {"bbox": list(bbox), "category_id": 3, **others}


# Values ---------------------------------------------------------------------------------------


def test_box_is_normalised_centre_and_size():
    labels = labels_of(box(20, 5, 40, 30))

    torch.testing.assert_close(
        labels["boxes"], torch.tensor([[40 / 80, 20 / 50, 40 / 80, 30 / 50]])
    )


def test_box_does_not_depend_on_resizing():
    labels = labels_of(box(20, 5, 40, 30), resized_size=(99, 161))

    torch.testing.assert_close(labels["boxes"], torch.tensor([[0.5, 0.4, 0.5, 0.6]]))


def test_without_conversion_boxes_are_corners_in_resized_pixels():
    labels = labels_of(box(20, 5, 40, 30), resized_size=(100, 240), normalise_boxes=False)

    torch.testing.assert_close(labels["boxes"], torch.tensor([[60.0, 10.0, 180.0, 70.0]]))


def test_box_partly_outside_is_clipped():
    labels = labels_of(box(-10, 40, 30, 100), normalise_boxes=False)

    torch.testing.assert_close(labels["boxes"], torch.tensor([[0.0, 40.0, 20.0, 50.0]]))


def test_given_area_scales_with_the_picture():
    labels = labels_of(box(20, 5, 40, 30, area=70), resized_size=(100, 240))

    assert labels["area"].tolist() == [70 * 2 * 3]


def test_missing_area_is_that_of_the_clipped_box():
    labels = labels_of(box(-10, 40, 30, 100), box(0, 0, 4, 5, area=None), resized_size=(100, 240))

    assert labels["area"].tolist() == [20 * 10 * 2 * 3, 4 * 5 * 2 * 3]


def test_class_labels_are_the_category_ids_in_order():
    labels = labels_of(box(1, 2, 3, 4, category_id=9), box(1, 2, 3, 4, category_id=0))

    assert labels["class_labels"].tolist() == [9, 0]


def test_sizes_are_height_and_width():
    labels = labels_of(resized_size=(100, 240))

    assert (labels["orig_size"].tolist(), labels["size"].tolist()) == ([50, 80], [100, 240])


def test_image_id_is_kept():
    assert labels_of(image_id=np.int64(39))["image_id"].tolist() == [39]


@pytest.mark.parametrize("annotations", [[], [box(5, 5, 0, 3)]], ids=["none", "all dropped"])
@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("class_labels", (0,), torch.int64),
        ("boxes", (0, 4), torch.float32),
        ("area", (0,), torch.float32),
        ("iscrowd", (0,), torch.int64),
        ("image_id", (1,), torch.int64),
        ("orig_size", (2,), torch.int64),
        ("size", (2,), torch.int64),
        ("crowd_boxes", (0, 4), torch.float32),
        ("crowd_class_labels", (0,), torch.int64),
    ],
)
def test_no_objects_give_empty_tensors(annotations, name, shape, dtype):
    tensor = labels_of(*annotations)[name]

    assert (tensor.shape, tensor.dtype) == (shape, dtype)


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("class_labels", (2,), torch.int64),
        ("boxes", (2, 4), torch.float32),
        ("area", (2,), torch.float32),
        ("iscrowd", (2,), torch.int64),
        ("crowd_boxes", (1, 4), torch.float32),
        ("crowd_class_labels", (1,), torch.int64),
    ],
)
def test_objects_give_one_row_each(name, shape, dtype):
    tensor = labels_of(box(1, 2, 3, 4), box(1, 2, 3, 4, iscrowd=1), box(5, 6, 7, 8))[name]

    assert (tensor.shape, tensor.dtype) == (shape, dtype)


@pytest.mark.parametrize("bbox", [(5, 5, 0, 3), (5, 5, 3, 0), (-9, 5, 0, 3), (0, 0, 0, 0)])
def test_box_without_area_is_dropped(bbox):
    labels = labels_of(box(*bbox), box(1, 2, 3, 4, category_id=8))

    assert labels["class_labels"].tolist() == [8]


def test_sliver_lost_in_rounding_is_dropped():
    assert len(labels_of(box(79.5, 2, 1e-17, 4))["boxes"]) == 0


def test_box_of_the_whole_picture_is_kept():
    assert labels_of(box(0, 0, WIDTH, HEIGHT))["boxes"].tolist() == [[0.5, 0.5, 1.0, 1.0]]


def test_crowd_stands_apart_in_the_same_format():
    labels = labels_of(box(20, 5, 40, 30, iscrowd=1), box(1, 2, 3, 4, category_id=8))

    torch.testing.assert_close(labels["crowd_boxes"], torch.tensor([[0.5, 0.4, 0.5, 0.6]]))
    assert labels["crowd_class_labels"].tolist() == [3]
    assert labels["class_labels"].tolist() == [8]


@pytest.mark.parametrize("iscrowd", [0, False, None])
def test_no_crowd_can_be_said_in_three_ways(iscrowd):
    assert labels_of(box(1, 2, 3, 4, iscrowd=iscrowd))["iscrowd"].tolist() == [0]


@pytest.mark.parametrize(
    "bbox", [(1, 2, 3, 4), np.array([1, 2, 3, 4]), torch.tensor([1.0, 2, 3, 4])]
)
def test_box_may_be_tuple_array_or_tensor(bbox):
    labels = labels_of({"bbox": bbox, "category_id": 0}, normalise_boxes=False)

    assert labels["boxes"].tolist() == [[1, 2, 4, 6]]


def test_other_keys_are_ignored():
    assert len(labels_of(box(1, 2, 3, 4, id=5, segmentation=[[1, 2]]))["boxes"]) == 1


# Errors of one annotation ---------------------------------------------------------------------

NEED_SIZE = r"bbox must be \[x, y, width, height\] with width and height at least 0"


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (box(80, 5, 10, 10), ValueError, "bbox must overlap its picture of height 50 and width 80"),
        (box(5, 50, 10, 10), ValueError, r"must overlap.* got \[5, 50, 10, 10\]"),
        (box(-20, 5, 20, 10), ValueError, "must overlap"),
        (box(5, -20, 10, 19), ValueError, "must overlap"),
        (box(90, 5, 10, 10, iscrowd=1), ValueError, "must overlap"),
        (box(5, 5, -1, 10), ValueError, NEED_SIZE + r".* got \[5, 5, -1, 10\]"),
        (box(5, 5, 1, -10), ValueError, NEED_SIZE),
        (box(5, float("nan"), 1, 1), ValueError, "bbox must hold finite numbers; got .*nan"),
        (box(5, 5, float("inf"), 1), ValueError, "bbox must hold finite numbers"),
        (box(5, 5, 5), ValueError, r"bbox must hold 4 numbers.* got \[5, 5, 5\]"),
        (box(), ValueError, r"bbox must hold 4 numbers"),
        (box("5", "5", "5", "5"), TypeError, "bbox must be a list of 4 numbers"),
        (box(5, 5, None, 5), TypeError, "bbox must be a list of 4 numbers"),
        ({"bbox": 5, "category_id": 0}, TypeError, "bbox must be a list of 4 numbers; got 5"),
        ({"bbox": [1, [2, 3], 4, 5], "category_id": 0}, TypeError, "bbox must be a list of 4"),
        ({"bbox": [1, 2, 3, 4]}, ValueError, r"lacks 'category_id', it has \['bbox'\]"),
        ({"category_id": 1}, ValueError, "lacks 'bbox'"),
        ([1, 2, 3, 4], TypeError, "must be a dictionary, got list"),
        (box(1, 2, 3, 4, category_id=-1), ValueError, "category_id must be an integer of.* got -1"),
        (box(1, 2, 3, 4, category_id=1.5), TypeError, "category_id must be an integer.* got 1.5"),
        (box(1, 2, 3, 4, category_id="cat"), TypeError, "category_id must be an.* got 'cat'"),
        (box(1, 2, 3, 4, category_id=None), TypeError, "category_id must be an.* got None"),
        (box(1, 2, 3, 4, category_id=[1]), TypeError, r"category_id must be an.* got \[1\]"),
        (box(1, 2, 3, 4, iscrowd=2), ValueError, "iscrowd must be 0 or 1; got 2"),
        (box(1, 2, 3, 4, iscrowd="no"), TypeError, "iscrowd must be 0 or 1; got 'no'"),
        (box(1, 2, 3, 4, area=-1), ValueError, "area must be a finite number.* got -1"),
        (box(1, 2, 3, 4, area=float("nan")), ValueError, "area must be a finite number.* got nan"),
        (box(1, 2, 3, 4, area="big"), TypeError, "area must be a finite number.* got 'big'"),
    ],
)
def test_wrong_annotation_is_named(bad, error, message):
    with pytest.raises(error, match=r"image_id 7, annotations\[1\].*" + message):
        labels_of(box(1, 2, 3, 4), bad, box(1, 2, 3, 4))


def test_error_names_the_annotation_id():
    with pytest.raises(ValueError, match=r"annotations\[0\] \(id 55\): category_id"):
        labels_of(box(1, 2, 3, 4, category_id=-1, id=55))


@pytest.mark.parametrize("image_id", ["a.jpg", 1.5, None])
def test_image_id_must_be_an_integer(image_id):
    with pytest.raises(TypeError, match=r"image_id must be an integer, got .*number the pictures"):
        labels_of(image_id=image_id)


# Errors of the sets ---------------------------------------------------------------------------

EMPTY = {"image_id": 0, "annotations": []}


def test_one_set_serves_one_picture():
    assert match_annotations(EMPTY, 1) == [EMPTY]


def test_tuple_of_sets_is_a_list():
    assert match_annotations((EMPTY, EMPTY), 2) == [EMPTY, EMPTY]


@pytest.mark.parametrize(("sets", "num_sets"), [(EMPTY, 1), ([EMPTY] * 3, 3), ([], 0)])
def test_counts_must_match(sets, num_sets):
    with pytest.raises(ValueError, match=f"got {num_sets} for 2 pictures"):
        match_annotations(sets, 2)


@pytest.mark.parametrize(
    ("sets", "error", "message"),
    [
        ("text", TypeError, "must be a dictionary or a list of dictionaries .*got str"),
        (5, TypeError, "must be a dictionary or a list of dictionaries .*got int"),
        ([EMPTY, 5], TypeError, r"annotations\[1\] must be a dictionary .*got int"),
        ([[EMPTY]], TypeError, r"annotations\[0\] must be a dictionary .*got list"),
        ({"annotations": []}, ValueError, r"annotations\[0\] lacks \['image_id'\]"),
        # The annotations themselves, without the set around them: the commonest slip.
        ([{"image_id": 0, "bbox": [1, 2, 3, 4]}], ValueError, r"lacks \['annotations'\], it has"),
        (
            {"image_id": 0, "annotations": None},
            TypeError,
            r"\"annotations\"\] must be a list, got N",
        ),
        ({"image_id": 0, "annotations": {}}, TypeError, r"\"annotations\"\] must be a list, got d"),
    ],
)
def test_wrong_form_of_a_set_is_named(sets, error, message):
    with pytest.raises(error, match=message):
        match_annotations(sets, 1)
