"""The commands in two processes: the files that one process writes, byte by byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import PartialState, debug_launcher
from detection_data import write_picture
from saved_detector import save_detector

import hf_querydet
from hf_querydet.cli import app

# Of five pictures in batches of two, the first process has the batches 1 and 3, the second one 2.
SIZES = [(61, 43), (38, 57), (75, 31), (52, 49), (33, 80)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("workplace")
    save_detector(root / "model", "conditional_detr", scale=0.1)
    rows = []
    for number, size in enumerate(SIZES):
        (root / "data").mkdir(exist_ok=True)
        write_picture(root / "data" / f"{number}.png", size, seed=number)
        objects = {"bbox": [[10 + number, 5, 25, 20]], "category": ["dog"]}
        rows.append({"file_name": f"{number}.png", "image_id": 3 * number, "objects": objects})
    (root / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def run_commands(root, out):
    """Evaluate with random access and as a stream, and detect."""
    PartialState._reset_state()  # what the parent process had, inherited by forking
    root, out = Path(root), Path(root, out)
    common = ["--batch-size", "2", "--num-workers", "0", "--cpu"]
    names = ["--label-names", "dog,ant,cat"]
    for name, extra in (("rows", []), ("stream", ["--streaming"])):
        files = ["--output", out / f"{name}.json", "--metrics-output", out / f"{name} metrics.json"]
        run("evaluate", root / "model", root / "data", *files, *common, *names, *extra)
    run("detect", root / "model", root / "data", "--output", out, "--threshold", "0.01", *common)


def run(*words):
    app([str(word) for word in words], standalone_mode=False)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_processes_write_the_files_of_one(workplace):
    run_commands(workplace, "alone")
    debug_launcher(run_commands, args=(str(workplace), "together"), num_processes=2)

    alone, together = content(workplace / "alone"), content(workplace / "together")
    assert len(alone) == 4 + 2 + len(SIZES)
    assert 0 < json.loads(alone["rows metrics.json"])["map"] < 1
    assert together.keys() == alone.keys()
    for name in alone:
        assert together[name] == alone[name], name


def test_launched_command_ends_with_the_code_of_one(workplace, tmp_path):
    for number in range(3):
        write_picture(tmp_path / f"{number}.png", SIZES[number], seed=number)
    (tmp_path / "0 bad.png").write_bytes(b"no picture")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", "hf_querydet", "detect"]
    words = [workplace / "model", tmp_path, "--output", tmp_path / "out", "--batch-size", "1"]

    result = subprocess.run(
        [*launch, *map(str, words)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(hf_querydet.__file__).parents[1]),
            "CUDA_VISIBLE_DEVICES": "",
        },
        check=False,
    )

    assert result.returncode == 1
    assert "objects in 3 pictures" in result.stdout, result.stderr
    assert result.stderr.count("Not read: ") == 1
    lines = (tmp_path / "out" / "detections.jsonl").read_text().splitlines()
    assert [json.loads(line)["file_name"] for line in lines] == ["0.png", "1.png", "2.png"]
