"""Directories of a run, whatever moment it was killed at."""

import json

import pytest
from accelerate import Accelerator

from hf_querydet import DETRConfig, DETRImageProcessor
from hf_querydet.training import (
    check_facts,
    checkpoint_name,
    list_checkpoints,
    open_run_directory,
    rename_checkpoint,
    run_facts,
    write_directory,
    write_json,
)

FIELDS = {"backbone": "resnet18", "id2label": {0: "cat", 1: "dog"}}


def write_value(value):
    return lambda directory: (directory / "value").write_text(value)


def test_directory_is_replaced_as_a_whole(tmp_path):
    write_directory(tmp_path / "best", lambda directory: (directory / "old").touch())
    write_directory(tmp_path / "best", write_value("new"))
    assert [path.name for path in tmp_path.rglob("*")] == ["best", "value"]


def test_failed_writing_leaves_the_directory_as_it_was(tmp_path):
    write_directory(tmp_path / "best", write_value("old"))

    def fail(directory):
        (directory / "value").write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_directory(tmp_path / "best", fail)
    assert (tmp_path / "best" / "value").read_text() == "old"
    write_directory(tmp_path / "best", write_value("new"))
    assert (tmp_path / "best" / "value").read_text() == "new"


def test_model_set_aside_by_an_interrupted_replacement_is_put_back(tmp_path, monkeypatch):
    write_directory(tmp_path / "best", write_value("old"))
    rename = type(tmp_path).rename

    def die_at_the_second(path, target):
        if path.name == "best.partial":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        write_directory(tmp_path / "best", write_value("new"))
    monkeypatch.undo()
    assert not (tmp_path / "best").exists()

    open_run_directory(tmp_path, resume=True)

    assert (tmp_path / "best" / "value").read_text() == "old"


@pytest.mark.parametrize("name", ["best", "last"])
def test_models_of_another_run_are_not_replaced(tmp_path, name):
    write_directory(tmp_path / name, write_value("old"))
    with pytest.raises(FileExistsError, match=f"holds {name} of another run, which would be"):
        open_run_directory(tmp_path, resume=False)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"--output-dir .*run cannot be written .*; choose another"):
        open_run_directory(tmp_path / "file" / "run", resume=False)


def test_trying_to_write_leaves_nothing(tmp_path):
    open_run_directory(tmp_path / "new" / "run", resume=False)
    assert list(tmp_path.iterdir()) == []


def saved_facts(tmp_path, config, processor):
    (tmp_path / "facts.json").write_text(json.dumps(run_facts(config, processor)))


def test_a_checkpoint_of_the_same_run_is_accepted(tmp_path):
    saved_facts(tmp_path, DETRConfig(**FIELDS), DETRImageProcessor())
    same = DETRConfig(**FIELDS, dropout=0.3, bbox_cost=2.0, auxiliary_loss=False)
    check_facts(tmp_path, run_facts(same, DETRImageProcessor()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_attention_heads": 4}, "decoder_attention_heads of .*: 8, now: 4"),
        (
            {"position_embeddings_at": "input"},
            "position_embeddings_at of .*: attention, now: input",
        ),
        ({"backbone": "resnet34"}, "backbone of .*'resnet18'.*, now: .*'resnet34'"),
        (
            {"id2label": {0: "dog", 1: "cat"}},
            r"labels of .*\['cat', 'dog'\], now: \['dog', 'cat'\]",
        ),
    ],
)
def test_a_checkpoint_of_another_detector_is_refused(tmp_path, change, message):
    saved_facts(tmp_path, DETRConfig(**FIELDS), DETRImageProcessor())
    with pytest.raises(ValueError, match=message):
        check_facts(tmp_path, run_facts(DETRConfig(**FIELDS | change), DETRImageProcessor()))


def test_a_checkpoint_for_pictures_of_another_size_is_refused(tmp_path):
    saved_facts(tmp_path, DETRConfig(**FIELDS), DETRImageProcessor())
    small = DETRImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})
    with pytest.raises(ValueError, match=r"picture size of .*800.*, now: .*96"):
        check_facts(tmp_path, run_facts(DETRConfig(**FIELDS), small))


@pytest.mark.parametrize("step", [40, 900, 2000])
def test_checkpoint_of_another_count_is_the_newest_one(tmp_path, step):
    for old in (900, 1000):
        write_directory(tmp_path / "checkpoints" / checkpoint_name(old), write_value(str(old)))

    rename_checkpoint(Accelerator(cpu=True), open_run_directory(tmp_path, resume=True), step)

    (checkpoint,) = list_checkpoints(tmp_path / "checkpoints")
    assert checkpoint.name == checkpoint_name(step)
    assert (checkpoint / "value").read_text() == "1000"


def test_checkpoint_is_there_until_all_processes_have_loaded_it(tmp_path):
    write_directory(tmp_path / "checkpoints" / checkpoint_name(9), write_value("9"))
    checkpoint, there = open_run_directory(tmp_path, resume=True), []

    class TwoProcesses:
        is_main_process = True

        def wait_for_everyone(self):
            there.append(checkpoint.exists())

    rename_checkpoint(TwoProcesses(), checkpoint, 4)

    assert there == [True, False]


def test_checkpoint_of_the_same_count_stays_with_the_one_before(tmp_path):
    for old in (900, 1000):
        write_directory(tmp_path / "checkpoints" / checkpoint_name(old), write_value(str(old)))
    rename_checkpoint(Accelerator(cpu=True), open_run_directory(tmp_path, resume=True), 1000)
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 2


def test_newest_complete_checkpoint_is_taken(tmp_path):
    for step in (900, 1000):
        (tmp_path / "checkpoints" / checkpoint_name(step)).mkdir(parents=True)
    (tmp_path / "checkpoints" / f"{checkpoint_name(1100)}.partial").mkdir()

    assert open_run_directory(tmp_path, resume=True).name == "step_00001000"
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 2


def test_run_is_not_mixed_with_another(tmp_path):
    assert open_run_directory(tmp_path, resume=True) is None
    assert open_run_directory(tmp_path / "new", resume=False) is None
    (tmp_path / "checkpoints" / checkpoint_name(1)).mkdir(parents=True)
    with pytest.raises(FileExistsError, match="holds a run already; continue it with --resume"):
        open_run_directory(tmp_path, resume=False)


def test_json_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    write_json(tmp_path / "a.json", {"value": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"value": object()})
    assert (tmp_path / "a.json").read_text() == '{\n  "value": 1\n}\n'
