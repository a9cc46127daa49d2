"""Run a script and keep what each process evaluates.

accelerate launch ... evaluated_weights.py SCRIPT OPTIONS...

The last evaluated model of process N becomes N.pt in the folder EVALUATED_WEIGHTS.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate import PartialState

import hf_querydet.evaluation

evaluate_detector = hf_querydet.evaluation.evaluate_detector


def evaluate_and_keep(model, *rest):
    name = f"{PartialState().process_index}.pt"
    weights = {key.removeprefix("module."): value for key, value in model.state_dict().items()}
    torch.save(weights, Path(os.environ["EVALUATED_WEIGHTS"]) / name)
    return evaluate_detector(model, *rest)


hf_querydet.evaluation.evaluate_detector = evaluate_and_keep
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
