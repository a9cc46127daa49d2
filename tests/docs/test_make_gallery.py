"""The pictures of the documentation, from a detector that has hardly been trained."""

import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image

import hf_querydet

SCRIPT = Path(hf_querydet.__file__).parents[1] / "docs" / "make_gallery.py"


@pytest.fixture
def gallery(monkeypatch):
    spec = importlib.util.spec_from_file_location("make_gallery", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "NUM_SCENES", 8)
    monkeypatch.setattr(module, "DRAWN_SCENES", (0, 1))
    monkeypatch.setattr(module, "EXPLAINED_SCENE", 2)
    monkeypatch.setattr(module, "NUM_HELD_OUT", 3)
    return module


def test_gallery_draws_small_pictures_of_what_was_trained(gallery, monkeypatch, tmp_path):
    options = ["--models", tmp_path / "models", "--output", tmp_path / "images", "--steps", 1]
    command = ["make_gallery.py", "--detectors", "efficient_detr", *options]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    gallery.train("efficient_detr", tmp_path / "models" / "efficient_detr", num_steps=1)
    # What is there is used as it is.
    monkeypatch.setattr(gallery, "train", None)
    gallery.main()
    names = ["assignment", "comparison", "detections", "explain_efficient_detr"]
    paths = sorted((tmp_path / "images").iterdir())
    assert [path.stem for path in paths] == names
    for path in paths:
        assert path.stat().st_size <= 80_000
        with Image.open(path) as drawn:
            assert drawn.width > 300
