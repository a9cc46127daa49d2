"""The command that shows why a query fired."""

import re

import pytest
from PIL import Image
from tiny import perturb, picture, tiny_config
from typer.testing import CliRunner

from hf_querydet import VARIANTS
from hf_querydet.cli import app


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    perturb(VARIANTS["detr"].detector(tiny_config(VARIANTS, "detr"))).save_pretrained(directory)
    size = {"shortest_edge": 64, "longest_edge": 100}
    VARIANTS["detr"].image_processor(size=size).save_pretrained(directory)
    return str(directory)


@pytest.fixture
def image(tmp_path):
    picture(90, 60).save(tmp_path / "cat.jpg")
    return str(tmp_path / "cat.jpg")


def explain(*arguments):
    return CliRunner().invoke(app, ["explain", *map(str, arguments)])


def test_best_query_is_drawn(model, image, tmp_path):
    result = explain(model, image, "--output", tmp_path / "why")
    assert result.exit_code == 0, result.output
    assert re.search(r"layer 3: LABEL_\d 0\.\d{3}, box -?\d", result.output)
    (path,) = (tmp_path / "why").iterdir()
    assert re.fullmatch(r"cat_query_[0-4]\.png", path.name)
    assert path.name in result.output.replace("\n", "")
    with Image.open(path) as drawn:
        assert drawn.format == "PNG"


def test_a_query_of_choice_is_drawn(model, image, tmp_path):
    result = explain(model, image, "--query", 3, "--head", 1, "--output", tmp_path / "why")
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "why").iterdir()] == ["cat_query_3.png"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--query", "5"], 1, "query must be 'best' or a whole number from 0 to 4"),
        (["--query", "last"], 2, "--query must be 'best' or a whole number, got 'last'"),
        (["--head", "2"], 1, "head must be from 0 to 1, got 2"),
    ],
)
def test_what_there_is_not_is_a_plain_error(model, image, tmp_path, options, code, message):
    result = explain(model, image, "--output", tmp_path / "why", *options)
    assert result.exit_code == code
    assert message in re.sub(r"[\s│]+", " ", result.output)
    assert not (tmp_path / "why").exists() or not list((tmp_path / "why").iterdir())


def test_missing_picture_is_a_plain_error(model, tmp_path):
    result = explain(model, tmp_path / "nothing.jpg")
    assert result.exit_code == 1
    assert "nothing.jpg" in result.output.replace("\n", "")
