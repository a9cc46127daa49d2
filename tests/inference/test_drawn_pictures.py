from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from saved_detector import build_detector

from hf_querydet.inference import (
    PictureFile,
    drawn_path,
    list_pictures,
    picture_drawer,
    picture_explainer,
)
from hf_querydet.visualization import explain

WHITE = torch.full((3, 500, 600), 255, dtype=torch.uint8)
FOUND = {
    "scores": torch.tensor([0.9]),
    "labels": torch.tensor([1]),
    "boxes": torch.tensor([[100.0, 200.0, 300.0, 400.0]]),
    "queries": torch.tensor([3]),
}
NOTHING = {name: values[:0] for name, values in FOUND.items()}


@pytest.mark.parametrize(
    ("name", "picture_format"),
    [("a.JPG", "JPEG"), ("sub/a.png", "PNG"), ("b.tif", "TIFF"), ("c.webp", "WEBP")],
)
def test_copy_has_the_name_and_format_of_its_picture(tmp_path, name, picture_format):
    picture_drawer(tmp_path, {1: "cat"})(PictureFile(Path(name), name), WHITE, FOUND)

    with Image.open(tmp_path / name) as drawn:
        assert drawn.format == picture_format
        pixels = np.asarray(drawn.convert("RGB"))
    assert pixels.shape == (500, 600, 3)
    # A frame on the box, and nothing far from it.
    assert (pixels[200:400, 98:104] < 200).any(axis=(1, 2)).all()
    assert (pixels[430:, 330:] > 250).all()
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {tmp_path / name, tmp_path / ".drawn_by_hf_querydet"}


def test_drawn_copies_are_no_pictures_of_the_folder_above(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(path)
    picture_drawer(tmp_path / "out", {1: "cat"})(PictureFile(path, "a.png"), WHITE, FOUND)

    assert [file.name for file in list_pictures(tmp_path)] == ["a.png"]
    assert [file.name for file in list_pictures(tmp_path / "out")] == ["a.png"]


def test_unusual_extension_gets_another(tmp_path):
    assert drawn_path("out", PictureFile(tmp_path / "a.gif", "a.gif")) == Path("out/a.gif.png")


@pytest.mark.parametrize(("detections", "query"), [(FOUND, 3), (NOTHING, "best")])
def test_explanation_is_that_of_the_surest_detection(tmp_path, detections, query):
    model, processor = build_detector()
    pixels = torch.randint(256, (3, 40, 60), dtype=torch.uint8)
    file = PictureFile(Path("sub/a.jpg"), "sub/a.jpg")

    picture_explainer(tmp_path, model, processor)(file, pixels, detections)

    explain(model, processor, pixels, query).save(tmp_path / "expected.png")
    drawn = np.asarray(Image.open(tmp_path / "sub" / "a.jpg.explanation.png"))
    np.testing.assert_array_equal(drawn, np.asarray(Image.open(tmp_path / "expected.png")))
