"""Scenes, and one run that several files look at."""

import pytest
from scene_files import write_split
from script_runs import arguments, run_script

# With everything that draws at random: dropout, augmentation, order.
EXACT_RUN = ("--epochs", 3, "--batch-size", 4, "--ema-decay", 0.5)
DROPOUT = {"dropout": 0.1}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_split(root / "train", 16, seed=0)
    write_split(root / "validation", 5, seed=1)
    return root


@pytest.fixture(scope="session")
def exact_run(scenes):
    """Command line of a run of three epochs of four steps, by its directory."""

    def words(output_dir, *extra):
        return arguments(scenes, output_dir, *EXACT_RUN, *extra, **DROPOUT)

    return words


@pytest.fixture(scope="session")
def run(exact_run, tmp_path_factory):
    """That run without interruption: what it printed, and its directory."""
    output_dir = tmp_path_factory.mktemp("run")
    return run_script(exact_run(output_dir, "--num-workers", 2)), output_dir
