"""A run that is killed and resumed ends where it would have ended, to the last bit."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from script_runs import SCRIPT, arguments, environment, losses, read_metrics, run_script

from hf_querydet.demo import SHAPES
from hf_querydet.training import checkpoint_name

KILLED_RUN = Path(__file__).parents[1] / "killed_run.py"


@pytest.fixture(scope="module")
def resumed_run(exact_run, tmp_path_factory):
    """`run`, killed while it saves after the third step of its second epoch, then resumed."""
    output_dir = tmp_path_factory.mktemp("resumed")
    words = exact_run(output_dir, "--checkpoint-steps", 1)
    process = subprocess.run(
        [sys.executable, str(KILLED_RUN), checkpoint_name(7), str(SCRIPT), *words],
        env=environment(),
        check=False,
        timeout=300,
        capture_output=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    left = sorted(path.name for path in (output_dir / "checkpoints").iterdir())
    return run_script([*words, "--resume"]), output_dir, left


def test_interrupted_checkpoint_is_never_picked_up(resumed_run):
    output, _, left = resumed_run
    assert left == ["step_00000005", "step_00000006", "step_00000007.partial"]
    assert "Resumed from step_00000006." in output
    assert list(losses(output)) == list(range(7, 13))


@pytest.mark.parametrize("name", ["best", "last", f"checkpoints/{checkpoint_name(12)}"])
def test_resumed_run_has_the_weights_of_an_uninterrupted_one_to_the_last_bit(
    run, resumed_run, name
):
    weights = [directory / name / "model.safetensors" for directory in (run[1], resumed_run[1])]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_resumed_run_has_the_history_of_an_uninterrupted_one(run, resumed_run):
    assert read_metrics(resumed_run[1] / "last") == read_metrics(run[1] / "last")


def test_interrupted_checkpoint_leaves_nothing(resumed_run):
    names = sorted(path.name for path in (resumed_run[1] / "checkpoints").iterdir())
    assert names == ["step_00000011", "step_00000012"]


def test_stream_is_resumed_in_the_middle_as_well(scenes, tmp_path):
    extra = ("--streaming", "--label-names", ",".join(sorted(SHAPES)), "--eval-split", "none")
    extra = (*extra, "--max-train-steps", 7, "--checkpoint-steps", 5)
    words = arguments(scenes, tmp_path / "run", *extra)
    run_script(words)
    weights = tmp_path / "run" / "last" / "model.safetensors"
    expected = weights.read_bytes()
    weights.unlink()
    # Left is the checkpoint after the first step of the second epoch.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / checkpoint_name(7))

    output = run_script([*words, "--resume"])

    assert list(losses(output)) == [6, 7]
    assert weights.read_bytes() == expected


def test_other_batches_cannot_continue_in_the_middle_of_an_epoch(scenes, tmp_path):
    extra = ("--epochs", 1, "--checkpoint-steps", 1, "--eval-split", "none")
    words = arguments(scenes, tmp_path, *extra)
    run_script([*words, "--batch-size", "4"])
    shutil.rmtree(tmp_path / "checkpoints" / checkpoint_name(4))
    with pytest.raises(ValueError, match=r"now there are \{'pictures_per_batch': 2"):
        run_script([*words, "--batch-size", "2", "--resume"])
