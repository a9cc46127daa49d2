import json

import numpy as np
import pytest
from PIL import Image
from saved_detector import ID2LABEL, save_detector
from tiny import picture
from typer.testing import CliRunner

from hf_querydet.cli import app
from hf_querydet.inference import detect, load_for_inference
from hf_querydet.visualization.drawing import wide_fonts

THRESHOLD = 0.57
SIZES = {"a.png": (61, 43), "b.jpg": (38, 57), "a/a.png": (75, 31), "a/b/a.png": (52, 49)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_detector(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "in"
    for number, (name, size) in enumerate(SIZES.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(*size, seed=number).save(folder / name)
    return folder


def run(*words, code=0):
    result = CliRunner().invoke(app, ["detect", *map(str, words), "--num-workers", "0"])
    assert result.exit_code == code, result.output
    return result.output


def read_lines(folder):
    return [json.loads(line) for line in (folder / "detections.jsonl").read_text().splitlines()]


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folder_gives_a_line_and_a_drawn_copy_per_picture(model, pictures, tmp_path):
    output = run(model, pictures, "--output", tmp_path / "out", "--threshold", THRESHOLD)

    names = ["a.png", "b.jpg", "a/a.png", "a/b/a.png"]
    found = detect(
        *load_for_inference(model, device="cpu"),
        [pictures / name for name in names],
        threshold=THRESHOLD,
    )
    lines = read_lines(tmp_path / "out")
    num_objects = 0
    for line, name, expected in zip(lines, names, found, strict=True):
        assert (line["file_name"], line["width"], line["height"]) == (name, *SIZES[name])
        labels = [ID2LABEL[label] for label in expected["labels"].tolist()]
        assert [each["label"] for each in line["detections"]] == labels
        scores = [each["score"] for each in line["detections"]]
        assert scores == pytest.approx(expected["scores"].tolist(), abs=1e-5)
        boxes = np.array([each["box"] for each in line["detections"]]).reshape(-1, 4)
        np.testing.assert_allclose(boxes, expected["boxes"].numpy(), atol=0.0051)
        num_objects += len(scores)
    assert 0 < num_objects < 20
    assert f"{num_objects} objects in 4 pictures" in output
    drawn = {path.relative_to(tmp_path / "out").as_posix() for path in content(tmp_path / "out")}
    assert drawn == {".drawn_by_hf_querydet", "detections.jsonl", *names}


def test_as_many_boxes_as_asked_for(model, pictures, tmp_path):
    numbers = []
    for top_k in (2, 4):
        words = ["--threshold", 0, "--top-k", top_k, "--no-pictures"]
        run(model, pictures, "--output", tmp_path / "out", *words)
        numbers.append({len(line["detections"]) for line in read_lines(tmp_path / "out")})
    assert numbers == [{2}, {4}]


def test_finding_nothing_says_what_could_be_changed(model, pictures, tmp_path):
    output = run(model, pictures, "--output", tmp_path / "out", "--threshold", 0.99)

    assert "0 objects in 4 pictures" in output
    assert "No score is above 0.99; --threshold lowers that." in output


def test_bad_file_is_reported_and_the_rest_is_done(model, pictures, tmp_path):
    (pictures / "a" / "bad.png").write_bytes(b"no picture")

    output = run(model, pictures, "--output", tmp_path / "out", code=1)

    assert "Not read: a/bad.png: The picture" in output
    assert "bad.png cannot be read" in output
    assert "1 files could not be read." in output
    assert [line["file_name"] for line in read_lines(tmp_path / "out")] == list(SIZES)
    assert not list((tmp_path / "out").rglob("bad.png"))


def test_results_inside_the_pictures_are_not_read_again(model, pictures):
    for _ in range(2):
        assert "in 4 pictures" in run(model, pictures, "--output", pictures / "out")


def test_coco_results_without_pictures(model, pictures, tmp_path):
    run(model, pictures, "--output", tmp_path / "out", "--format", "coco", "--no-pictures")

    assert {path.name for path in content(tmp_path / "out")} == {"detections.json", "images.json"}
    images = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [each["file_name"] for each in images] == list(SIZES)


def test_one_picture_and_its_explanation(model, pictures, tmp_path):
    run(model, pictures / "b.jpg", "--output", tmp_path / "out", "--explain", "--no-pictures")

    assert [line["file_name"] for line in read_lines(tmp_path / "out")] == ["b.jpg"]
    with Image.open(tmp_path / "out" / "b.jpg.explanation.png") as figure:
        assert figure.format == "PNG"


def test_labels_are_drawn_in_the_font_of_choice(model, pictures, tmp_path):
    options = ["--threshold", THRESHOLD, "--output"]
    run(model, pictures, *options, tmp_path / "usual")
    run(model, pictures, *options, tmp_path / "chosen", "--font", wide_fonts()[1])

    usual, chosen = ((tmp_path / name / "a.png").read_bytes() for name in ("usual", "chosen"))
    assert usual != chosen


@pytest.mark.parametrize("output", ["in", "."])
def test_pictures_are_never_replaced_by_their_copies(model, pictures, tmp_path, output):
    before = content(tmp_path)

    message = run(model, pictures, "--output", tmp_path / output, code=1)

    assert "copies with boxes would replace pictures. Choose another folder" in message
    assert content(tmp_path) == before
    run(model, pictures, "--output", tmp_path / output, "--no-pictures")
    assert set(content(tmp_path)) - set(before) == {tmp_path / output / "detections.jsonl"}


def test_folder_of_other_pictures_is_no_place_for_copies(model, pictures, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.png").write_bytes(b"mine")

    message = run(model, pictures, "--output", tmp_path / "mine", code=1)

    assert "holds pictures that no earlier run has drawn" in message
    assert [path.read_bytes() for path in (tmp_path / "mine").iterdir()] == [b"mine"]


def test_boxes_in_a_file_do_not_make_pictures_beside_it_copies(model, pictures, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.png").write_bytes((pictures / "a.png").read_bytes())
    run(model, tmp_path / "mine", "--output", tmp_path / "mine", "--no-pictures")

    message = run(model, pictures, "--output", tmp_path / "mine", code=1)

    assert "holds pictures that no earlier run has drawn" in message
    assert (tmp_path / "mine" / "a.png").read_bytes() == (pictures / "a.png").read_bytes()


def test_copies_of_a_run_that_was_stopped_may_be_replaced(model, pictures, tmp_path):
    run(model, pictures, "--output", tmp_path / "out")
    before = content(tmp_path / "out")
    (tmp_path / "out" / "detections.jsonl").unlink()

    run(model, pictures, "--output", tmp_path / "out")

    assert content(tmp_path / "out") == before


def test_copy_that_cannot_be_written_is_reported_and_the_rest_is_done(model, pictures, tmp_path):
    (tmp_path / "out" / "a.png").mkdir(parents=True)  # a folder in the copy's place

    output = run(model, pictures, "--output", tmp_path / "out", code=1)

    assert "Not drawn: a.png: " in output
    assert "1 pictures could not be drawn." in output
    assert [line["file_name"] for line in read_lines(tmp_path / "out")] == list(SIZES)
    assert (tmp_path / "out" / "b.jpg").is_file()


def test_folder_without_pictures_is_an_error_and_leaves_nothing(model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").touch()

    message = run(model, tmp_path / "in", "--output", tmp_path / "out", code=1)

    assert "holds no pictures" in message
    assert not (tmp_path / "out").exists()


def test_copies_that_fail_in_the_middle_leave_nothing(model, pictures, tmp_path, monkeypatch):
    def full(self, path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full)

    message = run(model, pictures, "--output", tmp_path / "out", code=1)

    assert "Not drawn: a/b/a.png: no space left" in message
    files = {path.name for path in content(tmp_path / "out")}
    assert files == {".drawn_by_hf_querydet", "detections.jsonl"}


def test_wrong_words_are_errors_of_usage(model, pictures, tmp_path):
    for words, message in (
        ([tmp_path / "nowhere"], "Invalid value for 'pictures'"),
        ([pictures, "--threshold", 1.5], "Invalid value for '--threshold'"),
        ([pictures, "--output", pictures / "b.jpg"], "Invalid value for '--output'"),
    ):
        assert message in run(model, *words, code=2)


def test_missing_model_is_named(pictures, tmp_path):
    message = run(tmp_path / "a" / "model", pictures, "--output", tmp_path / "out", code=1)

    assert "is not a directory, and not a Hub id" in message


def test_softer_arithmetic_finds_about_the_same(model, pictures, tmp_path):
    run(model, pictures, "--output", tmp_path / "full", "--threshold", 0)
    run(
        model,
        pictures,
        "--output",
        tmp_path / "half",
        "--threshold",
        0,
        "--mixed-precision",
        "bf16",
    )

    full, half = read_lines(tmp_path / "full"), read_lines(tmp_path / "half")
    assert full != half
    for one, other in zip(full, half, strict=True):
        scores = [[each["score"] for each in line["detections"]] for line in (one, other)]
        # bfloat16 has 8 bits of precision; errors grow over the layers.
        np.testing.assert_allclose(*scores, atol=0.1)
