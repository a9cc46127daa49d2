"""Detections beside what is there."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from hf_querydet.visualization import draw_comparison
from hf_querydet.visualization.comparison import (
    FALSE_ALARM,
    MATCH,
    MISS,
    Objects,
    compare,
)

ID2LABEL = {0: "cat", 1: "dog"}
PICTURE = Image.new("RGB", (500, 400), "gray")


def objects(boxes, names, crowd_boxes=(), crowd_names=()):
    return Objects(
        torch.tensor(boxes).reshape(-1, 4).float(),
        names,
        torch.tensor(crowd_boxes).reshape(-1, 4).float(),
        list(crowd_names),
    )


def test_surest_detection_takes_the_object_and_the_others_are_false_alarms():
    found = [(0.9, "cat", (0, 0, 10, 10)), (0.8, "cat", (0, 0, 10, 9)), (0.7, "dog", (0, 0, 9, 9))]
    comparison = compare(found, objects([[0, 0, 10, 9]], ["cat"]), iou_threshold=0.5)
    assert comparison.matches == [(0, 0, pytest.approx(0.9))]
    assert comparison.false_alarms == [1, 2]
    assert comparison.misses == []


def test_detection_takes_the_object_that_it_overlaps_most():
    there = objects([[0, 0, 10, 6], [0, 0, 10, 9], [50, 50, 60, 60]], ["cat", "cat", "cat"])
    comparison = compare(
        [(0.9, "cat", (0, 0, 10, 10)), (0.3, "cat", (0, 0, 10, 10))], there, iou_threshold=0.5
    )
    assert comparison.matches == [(0, 1, pytest.approx(0.9)), (1, 0, pytest.approx(0.6))]
    assert comparison.misses == [2]


def test_overlap_below_the_threshold_is_a_miss_and_a_false_alarm():
    found, there = [(0.9, "cat", (0, 0, 10, 10))], objects([[0, 0, 10, 6]], ["cat"])
    assert compare(found, there, iou_threshold=0.6).matches
    comparison = compare(found, there, iou_threshold=0.61)
    assert (comparison.misses, comparison.false_alarms) == ([0], [0])


def test_detections_in_a_crowd_count_neither_way():
    there = objects([], [], [[0, 0, 100, 100]], ["cat"])
    found = [
        (0.9, "cat", (10, 10, 20, 20)),
        (0.8, "dog", (10, 10, 20, 20)),
        (0.7, "cat", (95, 10, 120, 20)),
    ]
    comparison = compare(found, there, iou_threshold=0.5)
    assert comparison.ignored == [0]
    assert comparison.false_alarms == [1, 2]


def test_nothing_beside_nothing():
    assert compare([], objects([], []), iou_threshold=0.5).misses == []


def test_each_outcome_is_drawn_in_its_color():
    detections = {
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.tensor([0, 1]),
        "boxes": torch.tensor([[50.0, 50.0, 150.0, 150.0], [250.0, 50.0, 350.0, 150.0]]),
    }
    annotations = {
        "image_id": 1,
        "annotations": [
            {"bbox": [55, 55, 100, 100], "category_id": 0},
            {"bbox": [250, 250, 100, 100], "category_id": 0},
        ],
    }
    drawn = np.asarray(draw_comparison(PICTURE, detections, annotations, id2label=ID2LABEL))

    def color_of(y, x):
        return tuple(drawn[y, x].tolist())

    assert color_of(140, 51) == ImageColor.getrgb(MATCH)
    assert color_of(100, 251) == ImageColor.getrgb(FALSE_ALARM)
    on_frame = (drawn[250:350, 251] == ImageColor.getrgb(MISS)).all(-1)
    assert 0.3 < on_frame.mean() < 0.8  # dashed
    assert drawn.shape == (400, 500, 3)


def test_threshold_out_of_range_is_an_error():
    annotations = {"image_id": 1, "annotations": []}
    with pytest.raises(ValueError, match="iou_threshold must be above 0 and at most 1, got 0"):
        draw_comparison(PICTURE, [], annotations, iou_threshold=0)


def test_annotations_of_another_form_are_an_error():
    with pytest.raises(ValueError, match=r"annotations\[0\] lacks \['annotations'\]"):
        draw_comparison(PICTURE, [], {"image_id": 1})
