"""Two processes learn what one does, and push it to where a pipeline finds it."""

import hub_client
import pytest
from hub_server import USER
from scene_files import write_split
from script_runs import (
    OPTIONS,
    arguments,
    launch_two_processes,
    losses,
    read_metrics,
    run_script,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config

from hf_querydet import VARIANTS

REPO_ID = f"{USER}/two-processes"
# All that depends on which pictures share a process is off; the pictures are of one size.
SAME = ("--no-augment", "--epochs", 2, "--report-to", "tensorboard")


@pytest.fixture(scope="module")
def many_scenes(tmp_path_factory):
    """Ten steps of eight pictures."""
    root = tmp_path_factory.mktemp("many scenes")
    write_split(root / "train", 80, seed=0)
    write_split(root / "validation", 5, seed=1)
    return root


@pytest.fixture(scope="module")
def one_process(many_scenes, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("one process")
    run_script(arguments(many_scenes, output_dir, *SAME, "--batch-size", 8, backbone_norm="frozen"))
    return output_dir


@pytest.fixture(scope="module")
def two_processes(many_scenes, hub, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("two processes")
    push = ("--push-to-hub", "two-processes", "--hub-private", "--license", "mit")
    words = arguments(
        many_scenes, output_dir, *SAME, "--batch-size", 4, *push, backbone_norm="frozen"
    )
    output = launch_two_processes(words, hub.environment(tmp_path_factory.mktemp("home")))
    return output, output_dir


def logged_losses(output_dir):
    (events,) = (output_dir / "train_detector").glob("events.*")
    return [event.value for event in EventAccumulator(str(events)).Reload().Scalars("loss")]


def test_loss_falls(one_process):
    logged = logged_losses(one_process)
    assert logged[-1] < 0.9 * logged[0]


def test_two_processes_have_the_losses_of_one(one_process, two_processes):
    expected = logged_losses(one_process)
    assert len(expected) == 20
    assert logged_losses(two_processes[1]) == pytest.approx(expected, abs=1e-4)


def test_two_processes_have_the_metrics_of_one(one_process, two_processes):
    expected = read_metrics(one_process / "last")
    found = read_metrics(two_processes[1] / "last")
    assert found["map"] == pytest.approx(expected["map"], abs=1e-3)
    assert found["step"] == expected["step"] == 20


def test_best_is_pushed_and_nothing_else(two_processes, hub):
    output, output_dir = two_processes
    best = {path.name: path.read_bytes() for path in (output_dir / "best").iterdir()}
    pushed = {name: content for name, content in hub.files(REPO_ID).items() if name[0] != "."}
    assert {"model.safetensors", "preprocessor_config.json", "README.md"} <= set(best)
    assert pushed == best
    assert f"best to {hub.url}/{REPO_ID}/commit/" in output
    assert hub.repos[REPO_ID].private


def test_only_the_main_process_pushes(two_processes, hub):
    assert hub.requests.count(f"POST /api/models/{REPO_ID}/preupload/main") == 1
    assert hub.requests.count("POST /api/repos/create") >= 1


def test_model_card_on_the_hub_tells_how_to_use_it(two_processes, hub):
    card = hub.files(REPO_ID)["README.md"].decode()
    assert f'pipeline("object-detection", model="{REPO_ID}")' in card
    assert "license: mit" in card
    assert "type: map_50" in card


def test_pipeline_works_from_the_hub(two_processes, client):
    found = client(hub_client.detect, REPO_ID)
    assert len(found) == OPTIONS["num_queries"]


def test_heads_that_no_loss_reaches_stop_no_process(many_scenes, tmp_path):
    variant = VARIANTS["sparse_rcnn"]
    config = tiny_config(VARIANTS, "sparse_rcnn", auxiliary_loss=False)
    variant.detector(config).save_pretrained(tmp_path / "new")
    variant.image_processor().save_pretrained(tmp_path / "new")
    words = [
        "--model",
        tmp_path / "new",
        "--dataset",
        many_scenes,
        "--output-dir",
        tmp_path / "run",
    ]
    words += ["--shortest-edge", 64, "--num-workers", 0, "--batch-size", 2, "--log-steps", 1]
    words += ["--max-train-steps", 3, "--eval-split", "none"]

    output = launch_two_processes([str(word) for word in words])

    assert list(losses(output)) == [1, 2, 3]
