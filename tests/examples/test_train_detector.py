"""The training script, run as a user runs it, on generated scenes."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import USER, hub_environment
from scene_files import write_split
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import TINY_BACKBONE
from transformers import pipeline

import hf_querydet
from hf_querydet.demo import SHAPES

SCRIPT = Path(__file__).parents[2] / "examples" / "train_detector.py"
OPTIONS = {
    "backbone_config": TINY_BACKBONE,
    "d_model": 32,
    "num_queries": 10,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_split(root / "train", 16, seed=0)
    write_split(root / "validation", 5, seed=1)
    return root


def arguments(dataset, output_dir, *extra, **options):
    words = ["--model", "detr", "--no-pretrained-backbone", "--dataset", str(dataset)]
    for name, value in {**OPTIONS, **options}.items():
        words += ["--model-option", f"{name}={json.dumps(value)}"]
    words += ["--output-dir", str(output_dir), "--shortest-edge", "64", "--num-workers", "0"]
    words += ["--learning-rate", "3e-3", "--log-steps", "1", "--no-augment"]
    return [*words, *(str(word) for word in extra)]


def environment(changes=None):
    package_root = str(Path(hf_querydet.__file__).parents[1])
    return {
        **os.environ,
        "PYTHONPATH": package_root,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **(changes or {}),
    }


def launch(words, num_processes=1, changes=None):
    several = ["--multi_gpu"] if num_processes > 1 else ["--cpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *several]
    command += ["--num_processes", str(num_processes), "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    result = subprocess.run(
        [*command, str(SCRIPT), *words],
        capture_output=True,
        text=True,
        env=environment(changes),
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def losses(output):
    return {
        int(step): float(loss) for step, loss in re.findall(r"step (\d+)/\d+  loss (\S+)", output)
    }


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    """Three epochs of four steps."""
    output_dir = tmp_path_factory.mktemp("run")
    output = launch(arguments(scenes, output_dir, "--epochs", 3, "--batch-size", 4))
    return output, output_dir


def test_loss_falls_and_metrics_are_saved(run):
    output, output_dir = run
    by_step = losses(output)
    assert list(by_step) == list(range(1, 13))
    assert by_step[12] < 0.9 * by_step[1]
    metrics = json.loads((output_dir / "last" / "metrics.json").read_text())
    assert [row["step"] for row in metrics["history"]] == [4, 8, 12]
    assert 0 <= metrics["map"] <= 1
    assert {f"map_50/{shape}" for shape in SHAPES} <= set(metrics)


def test_saved_directory_works_in_a_pipeline(run, scenes):
    detect = pipeline("object-detection", model=str(run[1] / "best"))
    found = detect(str(scenes / "validation" / "0.png"), threshold=0.0)
    assert len(found) == OPTIONS["num_queries"]
    assert {each["label"] for each in found} <= set(SHAPES)


def test_killed_run_resumes_with_the_same_steps_and_order(run, scenes, tmp_path):
    words = arguments(scenes, tmp_path, "--epochs", 3, "--batch-size", 4, "--checkpoint-steps", 3)
    checkpoint = tmp_path / "checkpoints" / "step_00000006"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *words],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not checkpoint.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()

    output = launch([*words, "--resume"])

    first = int(re.search(r"Resumed from step_(\d+)", output).group(1))
    assert 6 <= first < 12
    resumed, uninterrupted = losses(output), losses(run[0])
    # The same pictures in the same order give the same loss; another order would not.
    assert resumed == {
        step: pytest.approx(loss, abs=2e-4) for step, loss in uninterrupted.items() if step > first
    }


def test_two_processes_have_the_loss_of_one(scenes, tmp_path):
    words = {"backbone_norm": "frozen"}
    extra = ("--max-train-steps", 3, "--eval-split", "none")
    one = launch(arguments(scenes, tmp_path / "one", *extra, "--batch-size", 8, **words))
    two = launch(arguments(scenes, tmp_path / "two", *extra, "--batch-size", 4, **words), 2)
    # The log shows four decimals.
    assert losses(two) == {
        step: pytest.approx(loss, abs=2e-4) for step, loss in losses(one).items()
    }
    assert list(losses(one)) == [1, 2, 3]


@pytest.fixture
def main_of_script(monkeypatch):
    """Run the script inside this process, for what fails before training."""
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run_main(words):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    yield run_main
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_other_labels_get_a_new_class_head(run, scenes, tmp_path, main_of_script):
    words = ["--model", str(run[1] / "last"), "--dataset", str(scenes), "--num-workers", "0"]
    words += ["--output-dir", str(tmp_path), "--max-train-steps", "1", "--eval-split", "none"]
    words += ["--label-names", "disc,box,wedge,sun"]
    rows = (scenes / "train" / "metadata.jsonl").read_text()
    numbered = tmp_path / "numbered" / "train"
    numbered.mkdir(parents=True)
    for path in (scenes / "train").glob("*.png"):
        (numbered / path.name).symlink_to(path)
    for number, shape in enumerate(SHAPES):
        rows = rows.replace(f'"{shape}"', str(number))
    (numbered / "metadata.jsonl").write_text(rows)
    words[words.index(str(scenes))] = str(numbered.parent)

    main_of_script(words)

    model, _ = hf_querydet.load_detector(tmp_path / "last")
    assert set(model.config.id2label.values()) == {"disc", "box", "wedge", "sun"}
    assert model.class_head.out_features == 5


def test_tracker_gets_the_loss_of_every_logged_step(scenes, tmp_path, main_of_script):
    extra = ("--max-train-steps", 2, "--eval-split", "none", "--report-to", "tensorboard")
    main_of_script(arguments(scenes, tmp_path, *extra))
    (events,) = (tmp_path / "train_detector").glob("events.*")
    accumulator = EventAccumulator(str(events)).Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == [1, 2]


def test_model_is_told_how_much_of_the_run_is_done(scenes, tmp_path, main_of_script, monkeypatch):
    told = []
    detector = hf_querydet.DETRForObjectDetection
    monkeypatch.setattr(detector, "set_training_progress", lambda _, share: told.append(share))
    extra = ("--max-train-steps", 4, "--eval-split", "none", "--batch-size", 2)
    extra = (*extra, "--gradient-accumulation", 2, "--checkpoint-steps", 3)
    words = arguments(scenes, tmp_path, *extra)

    main_of_script(words)

    # Before every batch, two of which make a step.
    assert told == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    told.clear()
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000004")
    main_of_script([*words, "--resume"])
    assert told == [0.75, 0.75]


def test_output_directory_with_a_run_is_not_overwritten(run, scenes, main_of_script):
    with pytest.raises(FileExistsError, match="holds a run already; continue it with --resume"):
        main_of_script(arguments(scenes, run[1]))


def test_unreadable_picture_is_named(scenes, tmp_path, main_of_script):
    write_split(tmp_path / "data" / "train", 4, seed=3)
    broken = tmp_path / "data" / "train" / "2.png"
    broken.write_bytes(broken.read_bytes()[:100])
    words = arguments(tmp_path / "data", tmp_path / "out", "--eval-split", "none")
    with pytest.raises(ValueError, match=r"2\.png"):
        main_of_script([*words, "--max-train-steps", "3"])


def test_dataset_without_boxes_is_refused(tmp_path, main_of_script):
    write_split(tmp_path / "data" / "train", 2, seed=3)
    metadata = tmp_path / "data" / "train" / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    for row in rows:
        row["objects"] = {"bbox": [], "category": []}
    metadata.write_text("\n".join(json.dumps(row) for row in rows))
    words = arguments(tmp_path / "data", tmp_path / "out", "--eval-split", "none")
    with pytest.raises(ValueError, match="box"):
        main_of_script(words)


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_git_files(files):
    return {path: content for path, content in files.items() if path != ".gitattributes"}


@pytest.fixture(scope="module")
def pushed_run(scenes, hub, tmp_path_factory):
    """A run of two processes that pushes to a new repository."""
    output_dir = tmp_path_factory.mktemp("pushed run")
    words = arguments(scenes, output_dir, "--max-train-steps", 1, "--eval-split", "none")
    words += ["--push-to-hub", f"{USER}/two-processes", "--hub-private"]
    output = launch(words, 2, hub.environment(tmp_path_factory.mktemp("home")))
    return output, output_dir


def test_best_is_pushed(pushed_run, hub):
    output, output_dir = pushed_run
    best = files_in(output_dir / "best")
    assert {"model.safetensors", "preprocessor_config.json", "metrics.json"} <= set(best)
    assert without_git_files(hub.files(f"{USER}/two-processes")) == best
    assert f"to {hub.url}/{USER}/two-processes." in output


def test_only_the_main_process_pushes(pushed_run, hub):
    assert hub.requests.count(f"POST /api/models/{USER}/two-processes/preupload/main") == 1


def test_pushed_repository_is_private_on_request(pushed_run, hub):
    assert hub.repos[f"{USER}/two-processes"].private


@pytest.fixture(scope="module")
def failed_push(scenes, tmp_path_factory):
    """A run that finds no Hub at its end."""
    output_dir = tmp_path_factory.mktemp("failed push")
    words = arguments(scenes, output_dir, "--max-train-steps", 1, "--eval-split", "none")
    words += ["--push-to-hub", f"{USER}/second-try", "--hub-private"]
    with socket.socket() as closed:
        # Taken, so that no one else answers, but not listening.
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        result = subprocess.run(
            [sys.executable, str(SCRIPT), *words],
            capture_output=True,
            text=True,
            env=environment(hub_environment(endpoint, tmp_path_factory.mktemp("home"))),
            check=False,
            timeout=300,
        )
    return result, output_dir / "best"


def test_failed_push_says_where_the_model_is_and_is_an_error(failed_push):
    result, best = failed_push
    assert result.returncode == 1
    assert re.search(f"Not pushed to {USER}/second-try: .*Connection refused", result.stderr)
    assert f"metrics are in {best}." in result.stderr
    hf_querydet.load_detector(best)


def test_command_of_a_failed_push_pushes(failed_push, hub, tmp_path):
    result, best = failed_push
    program, *words = shlex.split(result.stderr.splitlines()[-1])
    assert program == "hf"

    command = [sys.executable, "-m", "huggingface_hub.cli.hf", *words]
    subprocess.run(command, check=True, env=environment(hub.environment(tmp_path)), timeout=100)

    assert without_git_files(hub.files(f"{USER}/second-try")) == files_in(best)
    assert hub.repos[f"{USER}/second-try"].private
