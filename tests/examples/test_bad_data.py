"""Bad data in a training run: each case as docs/training.md says."""

import json

import pytest
from scene_files import write_split
from script_runs import arguments, run_script


def test_unreadable_picture_is_named(scenes, tmp_path):
    write_split(tmp_path / "data" / "train", 4, seed=3)
    broken = tmp_path / "data" / "train" / "2.png"
    broken.write_bytes(broken.read_bytes()[:100])
    words = arguments(tmp_path / "data", tmp_path / "out", "--eval-split", "none")
    with pytest.raises(ValueError, match=r"2\.png"):
        run_script([*words, "--max-train-steps", "3"])


def test_dataset_without_boxes_is_refused(tmp_path):
    write_split(tmp_path / "data" / "train", 2, seed=3)
    metadata = tmp_path / "data" / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    for row in rows:
        row["objects"] = {"bbox": [], "category": []}
    metadata.write_text("\n".join(json.dumps(row) for row in rows))
    words = arguments(tmp_path / "data", tmp_path / "out", "--eval-split", "none")
    with pytest.raises(ValueError, match="box"):
        run_script(words)
