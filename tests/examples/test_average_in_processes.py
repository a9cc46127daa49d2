"""Two processes, whose batch norms see other pictures, evaluate what is saved."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scene_files import write_split
from script_runs import arguments, launch_two_processes, losses

WRAPPER = Path(__file__).parents[1] / "evaluated_weights.py"


@pytest.fixture(scope="module", params=["average", "model"])
def run(request, tmp_path_factory):
    """Six pictures, which are less than a batch of both processes and more than one of each."""
    folder = tmp_path_factory.mktemp("average")
    write_split(folder / "scenes" / "train", 6, seed=0)
    write_split(folder / "scenes" / "validation", 2, seed=1)
    extra = ("--epochs", 2, "--batch-size", 4, "--card-pictures", 0)
    extra += ("--ema-decay", 0.9) if request.param == "average" else ()
    words = arguments(folder / "scenes", folder, *extra)
    changes = {"EVALUATED_WEIGHTS": str(folder)}
    return launch_two_processes(words, changes, wrapper=WRAPPER), folder


def test_fewer_pictures_than_a_batch_of_all_processes_make_one(run):
    assert list(losses(run[0])) == [1, 2]


@pytest.mark.parametrize("process", [0, 1])
def test_each_process_evaluates_what_is_saved(run, process):
    saved = load_file(run[1] / "last" / "model.safetensors")
    evaluated = torch.load(run[1] / f"{process}.pt", weights_only=True)
    assert any(name.endswith("running_mean") for name in saved)
    for name, value in saved.items():
        assert torch.equal(evaluated[name], value), name
