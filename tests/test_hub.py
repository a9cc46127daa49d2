"""Detectors on the Hub: pushed to and loaded from a server on this machine."""

import authors_files
import hub_client
import pytest
import torch
from hub_server import TOKEN, USER

from hf_querydet import VARIANTS

every_variant = pytest.mark.parametrize("name", list(VARIANTS))
ANY = next(iter(VARIANTS))


@pytest.fixture(scope="module")
def pushed(client):
    """Repository of a variant and what was pushed there, once per variant."""
    repos = {}

    def push(name):
        if name not in repos:
            repo_id = f"{USER}/{name}"
            repos[name] = repo_id, client(hub_client.push, name, repo_id)
        return repos[name]

    return push


@every_variant
def test_auto_classes_load_what_was_pushed(name, client, pushed):
    repo_id, expected = pushed(name)
    assert client(hub_client.load_through_auto_classes, repo_id) == expected


@every_variant
def test_load_detector_loads_what_was_pushed(name, client, pushed):
    repo_id, expected = pushed(name)
    assert client(hub_client.load, repo_id) == expected


@every_variant
def test_pipeline_from_the_hub_has_the_detections_of_the_pushed_model(name, client, pushed):
    repo_id, _ = pushed(name)
    found = client(hub_client.detect, repo_id)
    expected = client(hub_client.detect_with_pushed, name)
    # Where weights lie in memory decides the order of sums, and with it the last digit.
    scores = [detection.pop("score") for detection in expected]
    assert [detection.pop("score") for detection in found] == pytest.approx(scores, rel=1e-5)
    assert found == expected


@every_variant
def test_trainer_pushes_model_processor_and_card(name, client, hub):
    repo_id = f"{USER}/trained-{name}"
    trained = client(hub_client.train_and_push, name, repo_id)
    assert client(hub_client.load_through_auto_classes, repo_id) == trained
    assert f"# trained-{name}" in hub.files(repo_id)["README.md"].decode()


def test_converted_checkpoint_is_pushed(client, hub, tmp_path):
    sizes = {"size": 32, "inner": 40, "layers": (1, 1), "queries": 5, "classes": 3}
    shapes = authors_files.detr(kind=authors_files.RESNET18, **sizes)
    torch.save(authors_files.fill(shapes), tmp_path / "detr.pth")
    repo_id = f"{USER}/converted"
    paths = (str(tmp_path / "detr.pth"), str(tmp_path / "converted"))
    options = ("--variant", "detr", "--no-dc5", "--push-to-hub", repo_id)

    code, output = client(hub_client.run_querydet, "convert", *paths, *options)

    assert (code, repo_id in output) == (0, True), output
    assert client(hub_client.load, repo_id) == client(hub_client.load, paths[1])


@pytest.mark.parametrize(
    "load", [hub_client.load, hub_client.load_through_auto_classes], ids=lambda load: load.__name__
)
def test_revision_is_honoured(load, client, hub):
    repo_id = f"{USER}/revisions-{load.__name__}"
    first = client(hub_client.push, ANY, repo_id)
    commit = hub.repos[repo_id].branches["main"][-1]
    second = client(hub_client.push, ANY, repo_id, seed=1, shortest_edge=80)
    trial = client(hub_client.push, ANY, repo_id, seed=2, shortest_edge=96, revision="trial")

    assert client(load, repo_id) == second
    assert client(load, repo_id, revision=commit) == first
    assert client(load, repo_id, revision="trial") == trial


def test_token_reaches_every_file_of_a_private_repository(client, hub):
    repo_id = f"{USER}/private"
    expected = client(hub_client.push, ANY, repo_id, private=True)
    assert client(hub_client.load_without_own_token, repo_id, token=TOKEN) == expected
    assert repo_id in client(hub_client.message, hub_client.load_without_own_token, repo_id)


@pytest.mark.parametrize(
    ("repo_id", "told"),
    [
        (f"{USER}/nothing", f"OSError: {USER}/nothing is no directory here, and as a Hub id it"),
        ("one/two/three", "OSError: one/two/three is not a directory, and not a Hub id"),
    ],
)
def test_wrong_repository_is_named(repo_id, told, client):
    assert client(hub_client.message, hub_client.load, repo_id).startswith(told)


def test_wrong_revision_is_named(client, pushed):
    repo_id, _ = pushed(ANY)
    told = client(hub_client.message, hub_client.load, repo_id, revision="v9")
    assert told.startswith(f"OSError: {repo_id} is no directory here")
    assert "v9 is not a valid git identifier" in told
