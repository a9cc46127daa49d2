"""What docs/training.md says of `compute_metrics` runs as it stands."""

import re
from pathlib import Path

import pytest
from scene_files import write_split
from tiny import tiny_config

import hf_querydet
from hf_querydet import VARIANTS
from hf_querydet.demo import SHAPES

PAGE = Path(hf_querydet.__file__).parents[1] / "docs" / "training.md"


# Said by torch to everybody who has no GPU and leaves Trainer's defaults alone.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_compute_metrics_works_as_described(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_split(Path("my_pictures/validation"), 3, seed=1)
    config = tiny_config(VARIANTS, "detr", num_labels=4, id2label=dict(enumerate(SHAPES)))
    VARIANTS["detr"].detector(config).save_pretrained("outputs/mine/best")
    VARIANTS["detr"].image_processor().save_pretrained("outputs/mine/best")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "compute_metrics" in block)

    exec(block, {})

    assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1
