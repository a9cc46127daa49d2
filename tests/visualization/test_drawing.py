"""Boxes and labels on pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from hf_querydet.visualization import draw_comparison, draw_detections, enlargement
from hf_querydet.visualization.drawing import PALETTE, label_colors, wide_fonts
from hf_querydet.visualization.label_placement import place_labels

ID2LABEL = {0: "cat", 1: "dog"}


def pipeline_detection(label, score, corners):
    return {
        "label": label,
        "score": score,
        "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)),
    }


def pixels(picture):
    return np.asarray(picture).astype(int)


def test_frame_lies_on_the_borders_of_the_box():
    detection = pipeline_detection("cat", 0.5, (100, 120, 300, 260))
    drawn = pixels(draw_detections(Image.new("RGB", (500, 400), "white"), [detection]))
    color = ImageColor.getrgb(label_colors(["cat"], {})["cat"])
    for y, x in ((121, 250), (259, 250), (200, 101), (200, 299)):
        assert tuple(drawn[y, x]) == color
    assert (drawn[130:250, 110:290] == 255).all()
    assert (drawn[:, 305:] == 255).all()


def test_small_picture_is_enlarged_and_its_boxes_with_it():
    detection = pipeline_detection("cat", 0.5, (10, 12, 30, 26))
    drawn = draw_detections(Image.new("RGB", (50, 40), "white"), [detection])
    assert drawn.size == (500, 400)
    changed = (pixels(drawn) != 255).any(-1)
    assert changed[259, 110:290].all()
    assert not changed[150:, 310:].any()


@pytest.mark.parametrize(
    ("size", "factor"), [((480, 3), 1), ((479, 3), 2), ((1, 1), 480), ((4000, 9), 1)]
)
def test_enlargement_makes_the_longer_side_480_pixels(size, factor):
    assert enlargement(*size) == factor
    assert draw_detections(Image.new("RGB", size), []).size == (factor * size[0], factor * size[1])


def test_scale_keeps_the_size():
    assert draw_detections(Image.new("RGB", (30, 20)), [], scale=1).size == (30, 20)


def test_both_forms_of_detections_give_the_same_picture():
    picture = Image.new("RGB", (500, 300), "white")
    corners = [(10.0, 60.0, 200.0, 250.0), (150.0, 80.0, 400.0, 270.0)]
    from_pipeline = [
        pipeline_detection(ID2LABEL[label], score, box)
        for label, score, box in zip((1, 0), (0.75, 0.5), corners, strict=True)
    ]
    processed = {
        "scores": torch.tensor([0.75, 0.5]),
        "labels": torch.tensor([1, 0]),
        "boxes": torch.tensor(corners),
    }
    first = draw_detections(picture, from_pipeline, id2label=ID2LABEL)
    second = draw_detections(picture, processed, id2label=ID2LABEL)
    assert first.tobytes() == second.tobytes()


def test_surest_detection_is_drawn_on_top():
    box = (100, 120, 300, 260)
    found = [pipeline_detection("cat", 0.9, box), pipeline_detection("dog", 0.2, box)]
    drawn = pixels(draw_detections(Image.new("RGB", (500, 400)), found, id2label=ID2LABEL))
    assert tuple(drawn[200, 101]) == ImageColor.getrgb(PALETTE[0])


def test_box_beyond_the_picture_is_drawn_on_its_border():
    detection = pipeline_detection("cat", 0.5, (-50, 100, 900, 350))
    drawn = pixels(draw_detections(Image.new("RGB", (500, 400), "white"), [detection]))
    color = ImageColor.getrgb(label_colors(["cat"], {})["cat"])
    assert tuple(drawn[200, 0]) == color
    assert tuple(drawn[200, 499]) == color


def overlap(first, second):
    return all(first[a] < second[a + 2] and second[a] < first[a + 2] for a in (0, 1))


def test_labels_neither_overlap_nor_leave_the_picture():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, [640, 480], (60, 2, 2)), axis=1).reshape(60, 4)
    sizes = [(float(width), 19.0) for width in rng.uniform(30, 120, 60)]
    places = place_labels(corners, sizes, (640, 480))
    frames = [
        (*place, place[0] + np.ceil(size[0]), place[1] + size[1])
        for place, size in zip(places, sizes, strict=True)
        if place is not None
    ]
    assert len(frames) > 40
    assert all(min(x0, y0) >= 0 and x1 <= 640 and y1 <= 480 for x0, y0, x1, y1 in frames)
    assert not any(overlap(a, b) for i, a in enumerate(frames) for b in frames[:i])


def test_label_goes_above_its_box_or_inside_at_the_top_of_the_picture():
    corners = np.array([[50.0, 60.0, 150.0, 160.0], [200.0, 5.0, 300.0, 100.0]])
    places = place_labels(corners, [(40, 19), (40, 19)], (400, 300))
    assert places == [(50, 41), (200, 5)]


def test_first_label_has_the_place_that_two_want_and_a_label_without_room_none():
    box = [0.0, 0.0, 50.0, 20.0]
    assert place_labels(np.array([box, box]), [(50, 20), (50, 20)], (50, 20)) == [(0, 0), None]


def test_narrow_picture_shortens_labels():
    detection = pipeline_detection("a very long name of a label", 0.5, (2, 20, 18, 180))
    narrow = Image.new("RGB", (20, 200), "white")
    drawn = pixels(draw_detections(narrow, [detection]))
    assert drawn.shape == (600, 60, 3)
    color = ImageColor.getrgb(label_colors(["a very long name of a label"], {})[detection["label"]])
    # A filled label besides the frame.
    assert ((drawn == color).all(-1).sum(1) > 30).sum() > 10


def drawn_label(name, font=None):
    picture = Image.new("RGB", (500, 400), "white")
    return pixels(draw_detections(picture, [box_called(name)], font=font))


def box_called(name):
    return pipeline_detection(name, 0.5, (100, 120, 300, 260))


@pytest.mark.parametrize(("one", "other"), [("ö", "ß"), ("к", "ш"), ("λ", "ψ")])
def test_letters_beyond_ascii_are_drawn(one, other):
    # Their labels have the same colour, so that only letters can tell them apart.
    colors = label_colors([one, other], {})
    first, second = (
        (drawn_label(name) == ImageColor.getrgb(colors[name])).all(-1) for name in (one, other)
    )
    assert (first != second).any()


def test_labels_in_ascii_are_drawn_in_the_font_of_pil(monkeypatch):
    def refuse(*args):
        raise AssertionError("another font is looked for")

    expected = drawn_label("cat")
    monkeypatch.setattr("hf_querydet.visualization.drawing.wide_fonts", refuse)

    assert (drawn_label("cat") == expected).all()


def test_letters_that_no_font_has_are_no_reason_to_fail(monkeypatch):
    assert (drawn_label("猫") != 255).any()
    monkeypatch.setattr("hf_querydet.visualization.drawing.wide_fonts", lambda: ["no such font"])
    assert (drawn_label("Größe") != 255).any()


def test_matplotlib_has_a_font_where_the_system_has_none():
    _, path = wide_fonts()
    assert Path(path).is_file()


def test_font_of_choice_is_used():
    _, path = wide_fonts()
    assert (drawn_label("cat", font=path) != drawn_label("cat")).any()
    detections = [box_called("cat")]
    nothing = {"image_id": 0, "annotations": []}
    compared = [
        pixels(draw_comparison(Image.new("RGB", (500, 400)), detections, nothing, font=font))
        for font in (path, None)
    ]
    assert (compared[0] != compared[1]).any()


def test_a_font_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "letters.ttf").write_bytes(b"no font")
    for name in ("letters.ttf", "gone.ttf"):
        with pytest.raises(
            ValueError, match=rf"font must be a TrueType or OpenType .*{name} cannot"
        ):
            drawn_label("cat", font=tmp_path / name)


def test_colors_follow_the_labels_of_the_model_and_differ_within_a_picture():
    assert label_colors(["dog"], ID2LABEL)["dog"] == PALETTE[1]
    names = ["traffic light", "red blood cell", "person", "cat", "dog", "bus"]
    assert len(set(label_colors(names, {}).values())) == len(names)
    assert len(label_colors([str(i) for i in range(50)], {})) == 50


def test_any_kind_of_picture_is_drawn_on(tmp_path):
    Image.new("L", (500, 400), 128).save(tmp_path / "grey.png")
    for image in (tmp_path / "grey.png", torch.rand(3, 400, 500), np.zeros((400, 500), bool)):
        assert draw_detections(image, []).size == (500, 400)


@pytest.mark.parametrize(
    ("detections", "message"),
    [
        ([{"label": "cat", "score": 0.5}], r"detections lacks \['box'\]"),
        ({"scores": [], "labels": []}, r"detections lacks \['boxes'\]"),
        ([pipeline_detection("cat", 0.5, (0, 0, float("nan"), 1))], "box of a 'cat'.*not finite"),
    ],
)
def test_detections_of_another_form_are_an_error(detections, message):
    with pytest.raises(ValueError, match=message):
        draw_detections(Image.new("RGB", (500, 400)), detections)


def test_scale_below_one_is_an_error():
    with pytest.raises(ValueError, match="scale must be a whole number from 1 up, got 0"):
        draw_detections(Image.new("RGB", (500, 400)), [], scale=0)
