"""The training script with FSDP2: weights divided over two processes."""

import shutil
from pathlib import Path

import pytest
import torch
from script_runs import arguments, launch_two_processes, losses

from hf_querydet import VARIANTS

FSDP_ON_CPU = Path(__file__).parents[1] / "fsdp_on_cpu.py"
# Twice two steps.
SAME = ("--no-augment", "--epochs", 2, "--batch-size", 4)


def launch_with_fsdp(words):
    launcher = ("--use_fsdp", "--fsdp_version", "2")
    return launch_two_processes(words, launcher=launcher, wrapper=FSDP_ON_CPU)


@pytest.fixture(scope="module")
def divided(scenes, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("divided")
    return launch_with_fsdp(arguments(scenes, output_dir, *SAME)), output_dir


def test_divided_weights_have_the_losses_of_whole_ones(divided, scenes, tmp_path):
    whole = losses(launch_two_processes(arguments(scenes, tmp_path, *SAME)))
    assert list(whole) == [1, 2, 3, 4]
    assert losses(divided[0]) == pytest.approx(whole, abs=2e-4)


def load(output_dir):
    detector = VARIANTS["detr"].detector
    return detector.from_pretrained(output_dir / "last", output_loading_info=True)


def test_saved_weights_are_whole(divided):
    # A part of a weight would be an error here, because of its shape.
    _, info = load(divided[1])
    assert not any(info.values())


def test_resumed_run_ends_with_the_same_weights(divided, scenes, tmp_path):
    checkpoint = Path("checkpoints", "step_00000002")
    shutil.copytree(divided[1] / checkpoint, tmp_path / checkpoint)
    output = launch_with_fsdp(arguments(scenes, tmp_path, *SAME, "--resume"))

    assert list(losses(output)) == [3, 4]
    expected = load(divided[1])[0].state_dict()
    for name, tensor in load(tmp_path)[0].state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
