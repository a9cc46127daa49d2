"""Generated scenes, and the demo from beginning to end in few steps."""

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

from hf_querydet.demo import (
    ENLARGEMENT,
    OBJECT_SIZE_RANGE,
    SCENE_SIZE,
    SHAPES,
    ShapeScenes,
    _shape_mask,
    run_demo,
)


def objects(scene):
    return scene["annotations"]["annotations"]


def test_scene_is_the_same_whenever_it_is_drawn():
    scenes = ShapeScenes(9, seed=3)
    first, again = scenes[7], ShapeScenes(20, seed=3)[7]
    assert np.array_equal(np.asarray(first["image"]), np.asarray(again["image"]))
    assert first["annotations"] == again["annotations"]


def test_seeds_and_indexes_give_different_scenes():
    pictures = [
        ShapeScenes(9, seed=seed)[index]["image"] for seed, index in ((0, 1), (0, 2), (1, 1))
    ]
    assert len({picture.tobytes() for picture in pictures}) == 3


def test_scenes_have_two_to_eight_objects_of_all_classes():
    scenes = [ShapeScenes(60, seed=0)[index] for index in range(60)]
    assert {len(objects(scene)) for scene in scenes} == set(range(2, 9))
    assert {each["category_id"] for scene in scenes for each in objects(scene)} == {0, 1, 2, 3}


def test_objects_measure_8_to_50_percent_of_the_side_and_lie_inside():
    smallest, largest = (share * SCENE_SIZE for share in OBJECT_SIZE_RANGE)
    for index in range(60):
        for each in objects(ShapeScenes(60, seed=0)[index]):
            left, top, width, height = each["bbox"]
            # A pixel more or less, where an outline cuts pixels in half.
            assert smallest - 2 <= max(width, height) <= largest + 1
            assert left >= 0
            assert top >= 0
            assert left + width <= SCENE_SIZE
            assert top + height <= SCENE_SIZE


@pytest.mark.parametrize("shape", SHAPES)
def test_area_of_a_shape_is_that_of_its_outline(shape):
    # Shares of the bounding square's area that no rotation leaves: by hand from the vertices.
    least, most = {
        "circle": (0.77, 0.80),  # pi / 4
        "square": (0.50, 1.00),  # on its corner, upright
        "triangle": (0.42, 0.50),  # of sides s in a square of s cos(15 deg) at most, upright
        "star": (0.25, 0.40),
    }[shape]
    for seed in range(20):
        mask = _shape_mask(np.random.default_rng(seed), shape)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        side = max(len(rows), len(columns))
        # Half a pixel on each border, the more the smaller the shape.
        slack = 2 / side
        assert least - slack <= mask.sum() / side**2 <= most + slack


def test_index_beyond_the_scenes_is_an_error():
    with pytest.raises(IndexError, match=r"index must be in 0\.\.2, got 3"):
        ShapeScenes(3, seed=0)[3]


def test_demo_leaves_a_model_that_a_pipeline_loads_and_a_picture(tmp_path):
    metrics = run_demo(tmp_path, num_steps=2, num_scenes=4, num_held_out=3)

    assert 0 <= metrics["map_50"] <= 1
    detect = pipeline("object-detection", model=str(tmp_path))
    found = detect(ShapeScenes(1, seed=5)[0]["image"], threshold=0.0)
    assert {each["label"] for each in found} <= set(SHAPES)
    with Image.open(tmp_path / "detections.png") as drawn:
        size = drawn.size
    assert size == (3 * SCENE_SIZE * ENLARGEMENT, SCENE_SIZE * ENLARGEMENT)
