"""A run that is killed and resumed ends where it would have ended, to the last bit."""

import itertools
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from script_runs import SCRIPT, arguments, environment, losses, read_metrics, run_script

import hf_querydet.evaluation
from hf_querydet.demo import SHAPES
from hf_querydet.evaluation import evaluate_detector
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


def run_until_evaluation(number, words):
    """Run the script, which dies when it evaluates for the so-many-th time."""
    count = itertools.count(1)

    def evaluate(*args):
        if next(count) == number:
            raise KeyboardInterrupt
        return evaluate_detector(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_querydet.evaluation, "evaluate_detector", evaluate)
        with pytest.raises(KeyboardInterrupt):
            run_script(words)


def test_run_that_died_after_its_last_step_is_evaluated_and_saved(run, exact_run, tmp_path):
    words = exact_run(tmp_path, "--checkpoint-steps", 4)
    run_until_evaluation(3, words)
    assert read_metrics(tmp_path / "last")["epoch"] == 2

    output = run_script([*words, "--resume"])

    assert losses(output) == {}
    assert f"Saved {tmp_path / 'best'} and {tmp_path / 'last'}." in output
    assert read_metrics(tmp_path / "last") == read_metrics(run[1] / "last")
    for name in ("best", "last"):
        weights = [directory / name / "model.safetensors" for directory in (run[1], tmp_path)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_epoch_that_max_train_steps_ends_is_finished_without_more_steps(scenes, tmp_path):
    words = arguments(scenes, tmp_path, "--max-train-steps", 3, "--checkpoint-steps", 3)
    run_until_evaluation(1, words)
    assert not (tmp_path / "best").exists()

    output = run_script([*words, "--resume"])

    assert losses(output) == {}
    assert read_metrics(tmp_path / "best")["step"] == 3


def test_checkpoint_of_other_labels_is_refused(scenes, tmp_path):
    words = arguments(scenes, tmp_path / "run", "--max-train-steps", 1, "--eval-split", "none")
    run_script(words)
    renamed = shutil.copytree(scenes, tmp_path / "renamed")
    rows = renamed / "train" / "metadata.jsonl"
    # Its place in the alphabet is another.
    rows.write_text(rows.read_text().replace('"circle"', '"ring"'))
    words[words.index(str(scenes))] = str(renamed)

    with pytest.raises(
        ValueError, match=r"labels of .*Resume with the model, labels, picture size"
    ):
        run_script([*words, "--resume"])


def test_another_draw_of_held_out_pictures_is_refused(scenes, tmp_path):
    words = arguments(scenes / "train", tmp_path, "--eval-fraction", 0.25, "--epochs", 1)
    run_script([*words, "--seed", "3"])

    run_script([*words, "--seed", "3", "--resume"])
    with pytest.raises(ValueError, match=r"held-out part of .*'seed': 3}, now: .*'seed': 4}"):
        run_script([*words, "--seed", "4", "--resume"])
    words[words.index("0.25")] = "0.5"
    with pytest.raises(ValueError, match=r"'fraction': 0\.25, .* now: .*'fraction': 0\.5,"):
        run_script([*words, "--seed", "3", "--resume"])


def test_an_epoch_is_not_lost_if_its_evaluation_fails(scenes, tmp_path):
    damaged = shutil.copytree(scenes, tmp_path / "scenes")
    picture = damaged / "validation" / "0.png"
    complete = picture.read_bytes()
    picture.write_bytes(complete[:300])
    words = arguments(damaged, tmp_path / "run", "--epochs", 1)
    with pytest.raises(ValueError, match=r"0\.png\): the picture cannot be read"):
        run_script(words)
    picture.write_bytes(complete)

    output = run_script([*words, "--resume"])

    assert losses(output) == {}
    assert 0 <= read_metrics(tmp_path / "run" / "best")["map"] <= 1


def test_schedule_of_a_run_that_was_cut_in_an_epoch_reaches_its_end(scenes, tmp_path):
    words = arguments(scenes, tmp_path, "--eval-split", "none", "--batch-size", 2)
    run_script([*words, "--epochs", "2", "--max-train-steps", "5"])  # of eight in the first epoch

    output = run_script([*words, "--epochs", "2", "--resume"])

    # Thirteen steps in all, and the rate drops after four fifths of them.
    rates = dict(re.findall(r"step (\d+)/13 .* lr (\S+)", output))
    assert rates == {str(step): "3.00e-03" if step < 11 else "3.00e-04" for step in range(6, 14)}


def test_what_is_not_there_is_not_called_saved(scenes, tmp_path):
    words = arguments(scenes, tmp_path, "--max-train-steps", 1, "--eval-split", "none")
    run_script(words)
    shutil.rmtree(tmp_path / "best")
    assert f"Saved {tmp_path / 'last'}.\n" in run_script([*words, "--resume"])


def test_epochs_done_count_in_the_steps_of_other_batches(scenes, tmp_path):
    words = arguments(scenes, tmp_path, "--eval-split", "none")
    run_script([*words, "--epochs", "1", "--batch-size", "2"])  # eight steps

    output = run_script([*words, "--epochs", "3", "--batch-size", "4", "--resume"])

    assert list(losses(output)) == list(range(5, 13))
    history = read_metrics(tmp_path / "last")["history"]
    assert [(row["epoch"], row["step"]) for row in history] == [(1, 8), (2, 8), (3, 12)]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000008", "step_00000012"]


def test_window_that_a_run_was_cut_in_does_not_go_on(scenes, tmp_path):
    """accelerate keeps its place in a window of batches, which ends with the epoch here."""
    words = arguments(scenes, tmp_path / "cut", "--eval-split", "none", "--batch-size", 1)
    run_script([*words, "--max-train-steps", "1", "--gradient-accumulation", "3"])
    shutil.copytree(tmp_path / "cut", tmp_path / "whole")
    states = tmp_path / "whole" / "checkpoints" / checkpoint_name(1) / "random_states_0.pkl"
    content = torch.load(states, weights_only=False)
    assert content["step"] == 3
    torch.save({**content, "step": 0}, states)

    weights = []
    for name in ("cut", "whole"):
        words[words.index("--output-dir") + 1] = str(tmp_path / name)
        run_script([*words, "--epochs", "2", "--gradient-accumulation", "2", "--resume"])
        weights.append((tmp_path / name / "last" / "model.safetensors").read_bytes())

    assert weights[0] == weights[1]


def test_rates_of_a_resumed_run_are_those_of_its_command(scenes, tmp_path):
    words = arguments(scenes, tmp_path, "--eval-split", "none", "--batch-size", 8)
    run_script([*words, "--epochs", "1"])
    extra = ["--learning-rate", "5e-4", "--weight-decay", "0.25", "--backbone-factor", "0.5"]

    output = run_script([*words, "--epochs", "2", "--resume", *extra])

    assert re.findall(r"step (\d)/4 .* lr (\S+)", output) == [("3", "5.00e-04"), ("4", "5.00e-05")]
    state = torch.load(
        tmp_path / "checkpoints" / checkpoint_name(4) / "optimizer.bin", weights_only=True
    )
    groups = {group["name"]: group for group in state["param_groups"]}
    assert {name: group["initial_lr"] for name, group in groups.items()} == {
        "main": 5e-4,
        "backbone": 2.5e-4,
    }
    assert {group["weight_decay"] for group in groups.values()} == {0.25}


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
