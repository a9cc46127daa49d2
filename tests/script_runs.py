"""Runs of the training script on generated scenes, with a tiny detector.

What needs no process of its own runs in that of the tests, where a warning is an error.
"""

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from tiny import TINY_BACKBONE

import hf_querydet

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT = EXAMPLES / "train_detector.py"
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


def arguments(dataset, output_dir, *extra, **options):
    words = ["--model", "detr", "--no-pretrained-backbone", "--dataset", str(dataset)]
    for name, value in {**OPTIONS, **options}.items():
        words += ["--model-option", f"{name}={json.dumps(value)}"]
    words += ["--output-dir", str(output_dir), "--shortest-edge", "64", "--num-workers", "0"]
    words += ["--learning-rate", "3e-3", "--log-steps", "1"]
    return [*words, *(str(word) for word in extra)]


def run_script(words, script=SCRIPT):
    """Run the script inside this process; returns what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", [str(script), *words])
        try:
            with contextlib.redirect_stdout(printed):
                runpy.run_path(str(script), run_name="__main__")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
    return printed.getvalue()


def environment(changes=None):
    package_root = str(Path(hf_querydet.__file__).parents[1])
    return {
        **os.environ,
        "PYTHONPATH": package_root,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        **(changes or {}),
    }


def launch_two_processes(words, changes=None, *, launcher=("--multi_gpu",), wrapper=None):
    """Run the script in two processes, by `wrapper SCRIPT OPTIONS...` if there is a wrapper."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher]
    command += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    scripts = [str(path) for path in (wrapper, SCRIPT) if path is not None]
    result = subprocess.run(
        [*command, *scripts, *words],
        capture_output=True,
        text=True,
        env=environment(changes),
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def read_metrics(directory):
    return json.loads((directory / "metrics.json").read_text())


def losses(output):
    return {
        int(step): float(loss) for step, loss in re.findall(r"step (\d+)/\d+  loss (\S+)", output)
    }
