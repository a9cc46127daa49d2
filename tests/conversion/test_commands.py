"""The commands `convert` and `export-transformers`."""

import json

import authors_files
import pytest
import torch
from typer.testing import CliRunner

from hf_querydet import DETRConfig, DETRForObjectDetection
from hf_querydet.cli import app

SIZES = {"size": 32, "inner": 40, "layers": (1, 1), "queries": 5, "classes": 3}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "detr.pth"
    shapes = authors_files.detr(kind=authors_files.RESNET18, **SIZES)
    torch.save({"model": authors_files.fill(shapes)}, path)
    return path


def test_convert_then_export(checkpoint, tmp_path):
    (tmp_path / "names.txt").write_text("\ufeffant\nbee\ncat\n\n")
    (tmp_path / "fields.json").write_text('{"eos_coefficient": 0.2}')
    options = ("--dc5", "--labels", tmp_path / "names.txt", "--config", tmp_path / "fields.json")

    result = run("convert", checkpoint, tmp_path / "ours", "--variant", "detr", *options)

    assert result.exit_code == 0, result.output
    assert f"DETRForObjectDetection: {tmp_path / 'ours'}" in result.output
    assert "backbone: resnet18.tv_in1k, dilated (DC5)" in result.output
    assert "layers: 1 encoder, 1 decoder; queries: 5" in result.output
    assert "labels: 3, 3 with a name (ant, bee, cat, ...)" in result.output
    config = DETRConfig.from_pretrained(tmp_path / "ours")
    assert (config.dilation, config.eos_coefficient) == (True, 0.2)
    assert config.id2label == {0: "ant", 1: "bee", 2: "cat"}

    result = run("export-transformers", tmp_path / "ours", tmp_path / "theirs")

    assert result.exit_code == 0, result.output
    assert f"transformers.DetrForObjectDetection: {tmp_path / 'theirs'}" in result.output


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("names.json", '["ant", "bee"', "must hold a list of names, or an object from label"),
        ("names.json", '{"first": "ant"}', "must hold a list of names, or an object from label"),
        ("names.json", "3", "must hold a list of names, or an object from label"),
        ("names.json", "[1, 2, 3]", "must hold names that are strings"),
        ("names.txt", "a\nb\nc\nd", "has 3 labels, 0 to 2, but there are 4 names"),
        ("names.txt", "", "has 3 labels, 0 to 2, but there are 0 names"),
        ("names.txt", "a\n\nb", "line 2, is empty, and the labels after it would be one off"),
        ("names.txt", "a\nb\na", "has more than one label named 'a'; names must differ"),
        (None, None, "There is no file"),
    ],
)
def test_wrong_labels_are_told_plainly(name, content, message, checkpoint, tmp_path):
    path = tmp_path / (name or "nothing.txt")
    if name is not None:
        path.write_text(content)
    result = run("convert", checkpoint, tmp_path / "out", "--variant", "detr", "--labels", path)
    assert_refused(result, message, tmp_path)


def test_names_can_be_given_by_label(checkpoint, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps({"2": "cat", "0": "ant"}))
    options = ("--no-dc5", "--labels", tmp_path / "names.json")
    result = run("convert", checkpoint, tmp_path / "out", "--variant", "detr", *options)
    assert "labels: 3, 2 with a name (ant, cat, ...)" in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no json file"),
        ("[]", "must hold an object with fields of the configuration"),
        ('{"hidden": 3}', "DETRConfig has no fields 'hidden'"),
    ],
)
def test_wrong_fields_are_told_plainly(content, message, checkpoint, tmp_path):
    (tmp_path / "fields.json").write_text(content)
    options = ("--config", tmp_path / "fields.json")
    result = run("convert", checkpoint, tmp_path / "out", "--variant", "detr", *options)
    assert_refused(result, message, tmp_path)


def test_wrong_file_is_told_plainly(checkpoint, tmp_path):
    result = run("convert", checkpoint, tmp_path / "out", "--variant", "sparse_rcnn")
    assert_refused(result, "lacks 'init_proposal_features.weight'", tmp_path)
    result = run("export-transformers", tmp_path, tmp_path / "out")
    assert_refused(result, "has no config.json", tmp_path)


def assert_refused(result, message, tmp_path):
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("out*"))


def test_what_could_not_be_pushed_is_on_the_disk(checkpoint, tmp_path):
    # Tests have no network.
    options = ("--no-dc5", "--push-to-hub", "someone/detr")
    result = run("convert", checkpoint, tmp_path / "out", "--variant", "detr", *options)
    assert result.exit_code == 1
    assert "Cannot push to someone/detr: " in result.output
    assert f"hf upload someone/detr {tmp_path / 'out'}" in result.output
    DETRForObjectDetection.from_pretrained(tmp_path / "out")
