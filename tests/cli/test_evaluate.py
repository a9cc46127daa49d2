import contextlib
import io
import json

import pytest
from detection_data import SIZES, write_coco, write_image_folder
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from saved_detector import ID2LABEL, save_detector
from typer.testing import CliRunner

from hf_querydet.cli import app
from hf_querydet.inference import detect, load_for_inference

# Own numbers, in another order than the model's labels, and one that it has more.
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
CATEGORY_OF_LABEL = {0: 3, 2: 7}
# Near some boxes of the detector.
OBJECTS = [
    [{"bbox": [12, 4, 30, 20], "category_id": 3, "area": 600, "iscrowd": 0}],
    [{"bbox": [6, 6, 21, 27], "category_id": 7, "area": 567, "iscrowd": 0}],
    [],
    [{"bbox": [13, 5, 26, 22], "category_id": 3, "area": 572, "iscrowd": 0}],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_detector(tmp_path_factory.mktemp("model"), "conditional_detr", scale=0.1)


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / "data" / "instances.json", tmp_path / "data", CATEGORIES, OBJECTS)


def run(*words, code=0):
    result = CliRunner().invoke(app, ["evaluate", *map(str, words), "--num-workers", "0"])
    assert result.exit_code == code, result.output
    return result.output


def read(path):
    return json.loads(path.read_text())


def assert_same_rows(rows, expected):
    assert [(row["image_id"], row["category_id"]) for row in rows] == [
        (row["image_id"], row["category_id"]) for row in expected
    ]
    for row, other in zip(rows, expected, strict=True):
        assert row["score"] == pytest.approx(other["score"], rel=1e-5)
        assert row["bbox"] == pytest.approx(other["bbox"], abs=1e-3)


def expected_rows(model, folder, image_ids):
    """Every detection of labels that the dataset has, in its terms."""
    paths = [folder / f"photo {number}.png" for number in range(len(SIZES))]
    rows = []
    found = detect(*load_for_inference(model, device="cpu"), paths, batch_size=3, threshold=0.0)
    for image_id, each in zip(image_ids, found, strict=True):
        values = (each[name].tolist() for name in ("labels", "scores", "boxes"))
        rows += [
            {
                "image_id": image_id,
                "category_id": CATEGORY_OF_LABEL[label],
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
            }
            for label, score, (left, top, right, bottom) in zip(*values, strict=True)
            if label in CATEGORY_OF_LABEL
        ]
    return rows


def test_predictions_are_those_of_detect_in_the_terms_of_the_dataset(model, coco, tmp_path):
    run(model, coco, "--output", tmp_path / "predictions.json", "--batch-size", 3)

    rows = read(tmp_path / "predictions.json")
    assert_same_rows(rows, expected_rows(model, coco.parent, range(4)))
    assert {row["category_id"] for row in rows} == {3, 7}


def test_pycocotools_gets_the_same_numbers_from_the_files(model, coco, tmp_path):
    predictions, metrics = tmp_path / "new" / "predictions.json", tmp_path / "new" / "metrics.json"
    output = run(model, coco, "--output", predictions, "--metrics-output", metrics)

    # It counts a match to annotation 0 as none.
    content = read(coco)
    for annotation in content["annotations"]:
        annotation["id"] += 1
    coco.write_text(json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(coco))
        evaluation = COCOeval(truth, truth.loadRes(str(predictions)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    found = read(metrics)
    assert [found[name] for name in list(found)[:12]] == pytest.approx(evaluation.stats.tolist())
    assert 0 < found["map"] < 1
    assert f"AP {found['map']:15.3f}" in output
    assert "4 pictures of" in output


def test_boxes_that_are_corners(model, coco, tmp_path):
    run(model, coco, "--metrics-output", tmp_path / "sizes.json")
    content = read(coco)
    for annotation in content["annotations"]:
        left, top, width, height = annotation["bbox"]
        annotation["bbox"] = [left, top, left + width, top + height]
    coco.write_text(json.dumps(content))

    run(model, coco, "--box-format", "xyxy", "--metrics-output", tmp_path / "corners.json")

    assert read(tmp_path / "corners.json") == read(tmp_path / "sizes.json")
    assert read(tmp_path / "corners.json")["map"] > 0


def test_split_that_is_there_alone_is_evaluated(model, coco, tmp_path):
    coco.rename(coco.with_name("test.json"))
    output = run(model, coco.with_name("{split}.json"), "--split", "test")
    assert "4 pictures of " in output
    assert ", test\n" in output


def test_string_ids_of_pictures_come_back(model, coco, tmp_path):
    content = read(coco)
    names = {image["id"]: f"scan-{9 - image['id']}" for image in content["images"]}
    for image in content["images"]:
        image["id"] = names[image["id"]]
    for annotation in content["annotations"]:
        annotation["image_id"] = names[annotation["image_id"]]
    coco.write_text(json.dumps(content))

    run(model, coco, "--output", tmp_path / "predictions.json", "--batch-size", 3)

    expected = expected_rows(model, coco.parent, [names[number] for number in range(4)])
    assert_same_rows(read(tmp_path / "predictions.json"), expected)


def test_stream_gives_what_random_access_gives(model, tmp_path):
    folder = write_image_folder(tmp_path / "data" / "test")
    names = ["--split", "test", "--label-names", ",".join(ID2LABEL.values())]
    results = []
    for number, extra in enumerate(([], ["--streaming"])):
        output, metrics = tmp_path / f"{number}.json", tmp_path / f"metrics {number}.json"
        run(model, folder, *names, *extra, "--output", output, "--metrics-output", metrics)
        results.append((read(output), read(metrics)))

    assert results[0] == results[1]
    assert {row["image_id"] for row in results[0][0]} == {10, 13, 16, 19}
    assert {row["category_id"] for row in results[0][0]} == {"dog", "ant", "cat"}


def test_stream_without_ids_cannot_name_pictures(model, tmp_path):
    folder = write_image_folder(tmp_path / "data")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    rows = [{**json.loads(line), "image_id": "a"} for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [model, folder, "--streaming", "--label-names", "dog,cat,ant"]

    message = run(*words, "--output", tmp_path / "predictions.json", code=2)

    assert "leave out --streaming or --output" in message
    assert "4 pictures" in run(*words)


def test_score_threshold_drops_rows(model, coco, tmp_path):
    run(model, coco, "--output", tmp_path / "all.json")
    run(model, coco, "--output", tmp_path / "some.json", "--score-threshold", 0.012)

    rows = read(tmp_path / "all.json")
    kept = [row for row in rows if row["score"] > 0.012]
    assert 0 < len(kept) < len(rows)
    assert read(tmp_path / "some.json") == kept


def test_blanks_around_label_names_do_not_count(model, tmp_path):
    objects = [{"bbox": [[12, 4, 30, 20]], "category": [1]}]
    folder = write_image_folder(tmp_path / "numbers", objects)

    assert "1 pictures of" in run(model, folder, "--label-names", f"{ID2LABEL[0]} , {ID2LABEL[2]}")
    message = run(model, folder, "--label-names", f"{ID2LABEL[0]},,{ID2LABEL[2]}", code=1)
    assert "label_names must be names with commas between them" in message


def test_category_that_the_model_lacks_is_named(model, coco, tmp_path):
    content = read(coco)
    content["categories"][0]["name"] = "owl"
    coco.write_text(json.dumps(content))

    message = run(model, coco, "--output", tmp_path / "predictions.json", code=1)

    assert "id2label of the model lacks 1 of the dataset's names: ['owl']" in message
    assert not (tmp_path / "predictions.json").exists()


def test_bad_picture_stops_it_unless_it_may_be_skipped(model, coco):
    (coco.parent / "photo 1.png").write_bytes(b"no picture")

    assert "the picture cannot be read" in run(model, coco, code=1)
    assert "3 pictures of" in run(model, coco, "--skip-bad-images")


def test_stream_of_which_nothing_is_left_is_an_error(model, coco):
    for number in range(len(SIZES)):
        (coco.parent / f"photo {number}.png").write_bytes(b"no picture")

    message = run(model, coco, "--streaming", "--skip-bad-images", code=1)

    assert f"There are no pictures in {coco}, validation." in message


def test_missing_dataset_is_named(model, tmp_path):
    assert "nowhere" in run(model, tmp_path / "nowhere.json", code=1)


def test_softer_arithmetic_is_used(model, coco, tmp_path):
    run(model, coco, "--output", tmp_path / "full.json")
    run(model, coco, "--output", tmp_path / "half.json", "--mixed-precision", "bf16")

    full, half = read(tmp_path / "full.json"), read(tmp_path / "half.json")
    assert full != half
    assert len(full) == len(half)
