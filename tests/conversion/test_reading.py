"""Files are read without running what is in them."""

import argparse
import os
import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch

from hf_querydet.conversion import CheckpointError, read_checkpoint

MODEL = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


@pytest.fixture
def write(tmp_path):
    def write(content, **options):
        torch.save(content, tmp_path / "file.pth", **options)
        return tmp_path / "file.pth"

    return write


def assert_is_model(checkpoint):
    assert list(checkpoint.tensors) == list(MODEL)
    assert all(torch.equal(checkpoint.tensors[name], value) for name, value in MODEL.items())


@pytest.mark.parametrize(
    "content",
    [
        MODEL,
        OrderedDict(MODEL),
        {"model": MODEL, "optimizer": {"state": {}}, "epoch": 3},
        {"state_dict": MODEL},
        {"model": {f"module.{name}": value for name, value in MODEL.items()}},
        {"model": {name: value.numpy() for name, value in MODEL.items()}},
        {"model": MODEL, "iteration": np.int64(3), "best": np.float32(0.5)},
    ],
    ids=["bare", "ordered", "beside others", "state_dict", "module", "arrays", "numpy numbers"],
)
@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before 1.6"])
def test_model_is_found(content, archive, write):
    path = write(content, _use_new_zipfile_serialization=archive)
    assert_is_model(read_checkpoint(path))


def test_prefix_stays_where_not_all_names_have_it(write):
    path = write({"module.a": torch.ones(1), "b": torch.ones(1)})
    assert list(read_checkpoint(path).tensors) == ["module.a", "b"]


def test_options_of_the_training_script_are_read(write):
    path = write({"model": MODEL, "args": argparse.Namespace(nheads=8, names=["backbone.0"])})
    assert read_checkpoint(path).arguments == {"nheads": 8, "names": ["backbone.0"]}
    assert read_checkpoint(write({"model": MODEL, "args": None})).arguments == {}


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before 1.6"])
def test_code_in_a_file_is_not_run(archive, write, tmp_path):
    trace = tmp_path / "trace"
    path = write({"model": MODEL, "x": Command(trace)}, _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match=r"holds posix\.mkdir, and reading that may run code"):
        read_checkpoint(path)
    assert not trace.exists()


def test_whole_module_is_refused_with_the_way_to_its_tensors(write):
    with pytest.raises(
        CheckpointError, match=r"(?s)linear\.Linear.*If you trust the file.*torch\."
    ):
        read_checkpoint(write({"model": torch.nn.Linear(1, 1)}))


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before 1.6"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_file_that_was_cut_off_is_said_to_be(archive, share, write):
    path = write({"model": MODEL}, _use_new_zipfile_serialization=archive)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"is damaged or was cut off .*get it again\. It has"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content", [b"", b"<!doctype html>", pickle.dumps(1)], ids=["empty", "page", "pickle"]
)
def test_other_files_are_no_checkpoints(content, tmp_path):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: torch\.save writes files"):
        read_checkpoint(tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no model, but an object of type list"),
        ({"model": {}}, "holds no model, but a dictionary with nothing in it"),
        ({"epoch": 3}, "expected, but 'epoch' is an object of type int"),
        ({"model": {"ema": MODEL}}, "but 'ema' is a dictionary with 'a.weight', 'a.bias'"),
    ],
)
def test_file_without_a_model_says_what_it_holds(content, message, write):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_checkpoint(write(content))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*nothing\.pth"):
        read_checkpoint(tmp_path / "nothing.pth")
