"""The pictures of the documentation, from a detector that has not been trained."""

import importlib.util
import sys
from pathlib import Path

from PIL import Image

import hf_querydet
from hf_querydet.demo import build_detector

SCRIPT = Path(hf_querydet.__file__).parents[1] / "docs" / "make_gallery.py"


def test_gallery_consists_of_small_pictures(monkeypatch, tmp_path):
    for part in build_detector():
        part.save_pretrained(tmp_path / "model")
    spec = importlib.util.spec_from_file_location("make_gallery", SCRIPT)
    gallery = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gallery)
    options = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "images")]
    monkeypatch.setattr(sys, "argv", ["make_gallery.py", *options])
    gallery.main()
    paths = sorted((tmp_path / "images").iterdir())
    assert [path.stem for path in paths] == [
        "assignment",
        "comparison",
        "detections",
        "explanation",
    ]
    for path in paths:
        assert path.stat().st_size <= 100_000
        with Image.open(path) as drawn:
            assert drawn.width > 300
