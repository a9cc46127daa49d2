"""The Python blocks of the README and of docs/inference.md run as they stand."""

import os
import re
from pathlib import Path

import pytest
from scene_files import write_split
from tiny import tiny_config

import hf_querydet
from hf_querydet import VARIANTS
from hf_querydet.data import load_detection_dataset
from hf_querydet.demo import build_detector

ROOT = Path(hf_querydet.__file__).parents[1]


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


BLOCKS = python_blocks("README.md")


@pytest.fixture
def in_prepared_directory(tmp_path, monkeypatch):
    """A model where the README has one, a dataset, and no Hub."""
    monkeypatch.chdir(tmp_path)
    for part in build_detector():
        part.save_pretrained("demo")
    VARIANTS["detr"].detector(tiny_config(VARIANTS, "detr")).save_pretrained("detr")
    VARIANTS["detr"].image_processor().save_pretrained("detr")
    write_split(Path("my_pictures/train"), 4, seed=0)
    write_split(Path("my_pictures/validation"), 2, seed=1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


# Said by torch to everybody who trains without a GPU and leaves Trainer's defaults alone.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_python_blocks_run_in_order(in_prepared_directory):
    names = {}
    for block in BLOCKS:
        # The one Hub id stands for a repository that the tests cannot reach.
        exec(block.replace("facebook/detr-resnet-50", "detr"), names)
    assert len(BLOCKS) >= 4
    assert len(names["results"]) == 2
    assert os.path.isdir("outputs/trainer")


def test_python_blocks_about_inference_run(in_prepared_directory, capsys):
    dataset = load_detection_dataset("my_pictures", split="validation")
    names = {
        "pictures": (f"my_pictures/validation/{number}.png" for number in range(2)),
        "dataset": dataset.with_labels(build_detector()[0].config.id2label),
    }
    blocks = python_blocks("docs/inference.md")
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    assert capsys.readouterr().out.count("tensor") >= 6
    assert 0 <= names["metrics"]["map"] <= 1
