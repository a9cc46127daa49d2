"""Pushing: what is noticed before training, and what a failure leaves."""

import shlex

import hub_client
import pytest
from hub_server import TOKEN, USER

from hf_querydet.training import HubError, HubRepository


@pytest.fixture
def directory(tmp_path):
    directory = tmp_path / "a model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def files(hub, repo_id, revision="main"):
    found = hub.files(repo_id, revision)
    return {path: content for path, content in found.items() if path != ".gitattributes"}


def test_missing_repository_is_created_as_wished(client, hub):
    repo_id = client(hub_client.prepare_repository, repo_id="new", private=True, revision="trial")
    assert repo_id == f"{USER}/new"
    assert hub.repos[repo_id].private
    assert "trial" in hub.repos[repo_id].branches


def test_existing_repository_is_taken(client, hub):
    names = [client(hub_client.prepare_repository, repo_id="twice") for _ in range(2)]
    assert names == [f"{USER}/twice"] * 2


@pytest.mark.parametrize(
    ("function", "fields", "told"),
    [
        (hub_client.prepare_repository, {"token": "hf_wrong"}, "Invalid user token"),
        (hub_client.prepare_without_token, {}, "Token"),
        (hub_client.prepare_without_network, {}, "Connection refused"),
        (hub_client.prepare_repository, {"repo_id": "a/b/c"}, "a/b/c"),
    ],
    ids=["token", "no token", "no network", "name"],
)
def test_what_prevents_a_push_is_said_beforehand(function, fields, told, client):
    message = client(hub_client.message, function, **{"repo_id": "mine", **fields})
    assert message.startswith(f"HubError: Cannot push to {fields.get('repo_id', 'mine')}: ")
    assert told in message
    assert "push afterwards with `hf upload`" in message
    assert "hf_wrong" not in message


def test_repository_that_may_only_be_read_is_noticed_beforehand(client, hub):
    repo_id = client(hub_client.prepare_repository, repo_id="read-only")
    hub.read_only.add(repo_id)
    message = client(hub_client.message, hub_client.prepare_repository, repo_id=repo_id)
    assert message.startswith(f"HubError: Cannot push to {repo_id}: ")
    assert "403" in message


def test_offline_mode_is_noticed_beforehand():
    with pytest.raises(HubError, match="Cannot push to me/it: HF_HUB_OFFLINE is set"):
        HubRepository("me/it").prepare()


def test_directory_arrives_at_its_revision(client, hub, directory):
    fields = {"repo_id": "arrives", "revision": "trial", "token": TOKEN}
    fields["repo_id"] = client(hub_client.prepare_repository, **fields)
    address = client(hub_client.push_directory, directory, "After 3 steps", **fields)
    assert address.startswith(f"{hub.url}/{USER}/arrives/commit/")
    assert files(hub, fields["repo_id"], "trial") == {
        "config.json": b"{}",
        "model.safetensors": b"weights",
    }
    assert files(hub, fields["repo_id"]) == {}


def test_command_of_a_failed_push_pushes(client, hub, directory):
    fields = {"repo_id": "fails", "private": True, "revision": "trial"}
    fields["repo_id"] = client(hub_client.prepare_repository, **fields)
    hub.read_only.add(fields["repo_id"])
    push = hub_client.push_directory
    message = client(hub_client.message, push, directory, "After 3 steps", token=TOKEN, **fields)
    assert message.startswith(f"HubError: Not pushed to {USER}/fails: ")
    assert f"all is in {directory}. To push it again:\n" in message
    assert TOKEN not in message

    hub.read_only.clear()
    command = message.splitlines()[-1]
    assert client(hub_client.run_command, shlex.split(command)) in (0, None)

    assert files(hub, fields["repo_id"], "trial")["model.safetensors"] == b"weights"


def test_token_is_not_printed_with_the_repository():
    assert "hf_secret" not in repr(HubRepository("me/it", token="hf_secret"))
