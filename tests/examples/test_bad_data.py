"""Bad data in a training run: each case as docs/training.md says."""

import json

import pytest
import torch
from script_runs import arguments, losses, read_metrics, run_script
from tiny import picture

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
BOX = [5, 6, 20, 30]


def write_coco(folder, num_pictures=4):
    """A COCO json with one object in each picture; returns its content for a change."""
    folder.mkdir()
    images, annotations = [], []
    for number in range(num_pictures):
        picture(60, 50, seed=number).save(folder / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "width": 60, "height": 50})
        annotations.append(
            {"id": number, "image_id": number, "category_id": 1 + number % 2, "bbox": BOX}
        )
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    return save(folder, content)


def save(folder, content):
    (folder / "train.json").write_text(json.dumps(content))
    return content


def train(folder, *extra):
    words = ("--eval-split", "none", "--max-train-steps", 2, "--batch-size", 1, *extra)
    return run_script(arguments(folder / "{split}.json", folder / "out", *words))


def truncate(folder, content):
    path = folder / "2.jpg"
    path.write_bytes(path.read_bytes()[:300])


def delete(folder, content):
    (folder / "2.jpg").unlink()


def negative_size(folder, content):
    content["annotations"][2]["bbox"] = [5, 6, 20, -3]


def unknown_category(folder, content):
    content["annotations"][2]["category_id"] = 7


BAD_ROWS = {
    truncate: "the picture cannot be read: OSError",
    delete: "FileNotFoundError",
    negative_size: "width and height at least 0",
    unknown_category: "category 7 is not among",
}


@pytest.mark.parametrize("damage", list(BAD_ROWS), ids=lambda damage: damage.__name__)
def test_row_that_cannot_be_used_is_named(tmp_path, damage):
    folder = tmp_path / "data"
    content = write_coco(folder)
    damage(folder, content)
    save(folder, content)
    with pytest.raises(
        ValueError, match=rf"row 2 \(image_id 2, file .*2\.jpg\).*{BAD_ROWS[damage]}"
    ):
        train(folder, "--max-train-steps", 4)


def test_bad_rows_are_left_out_on_request(tmp_path, caplog):
    folder = tmp_path / "data"
    content = write_coco(folder, num_pictures=5)
    truncate(folder, content)
    (folder / "4.jpg").unlink()
    content["annotations"][0]["bbox"] = [5, 6, -1, 3]
    save(folder, content)
    # Two good rows are left: an epoch of two steps.
    assert list(losses(train(folder, "--skip-bad-images"))) == [1, 2]
    assert read_metrics(folder / "out" / "last")["epoch"] == 1


def change_nothing_left(content):
    content["images"], content["annotations"] = [], []


def change_no_boxes(content):
    content["annotations"] = []


def change_one_id_twice(content):
    content["images"][3]["id"] = 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_nothing_left, r"train\.json has no pictures: its list images is empty"),
        (change_no_boxes, "the objects of all 4 rows of the split 'train' are empty"),
        (change_one_id_twice, r"several pictures of image_id \[2\]"),
    ],
)
def test_dataset_that_cannot_be_used_is_refused(tmp_path, change, message):
    folder = tmp_path / "data"
    content = write_coco(folder)
    change(content)
    save(folder, content)
    with pytest.raises(ValueError, match=message):
        train(folder)
    assert not (folder / "out").exists()


def test_category_that_only_the_evaluation_split_has_is_named_before_training(tmp_path):
    folder = tmp_path / "data"
    content = write_coco(folder)
    content["categories"].append({"id": 5, "name": "owl"})
    content["annotations"][3]["category_id"] = 5
    (folder / "eval.json").write_text(json.dumps(content))
    content["categories"].pop()
    content["annotations"].pop()
    save(folder, content)
    words = arguments(folder / "{split}.json", folder / "out", "--eval-split", "eval")
    with pytest.raises(ValueError, match=r"row 3 .*3\.jpg\): category 5 is not among"):
        run_script(words)
    assert not (folder / "out").exists()


def test_boxes_that_are_corners_are_recognised_and_read_on_request(tmp_path):
    folder = tmp_path / "data"
    content = write_coco(folder)
    for annotation in content["annotations"]:
        annotation["bbox"] = [30, 20, 50, 45]
    save(folder, content)
    with pytest.raises(
        ValueError, match=r"4 of 4 reach far beyond .*box_format='xyxy'.*--box-format"
    ):
        train(folder)
    assert list(losses(train(folder, "--box-format", "xyxy"))) == [1, 2]


def test_evaluated_pictures_without_a_box_are_mentioned(tmp_path):
    folder = tmp_path / "data"
    content = write_coco(folder)
    content["annotations"] = content["annotations"][:1]
    save(folder, content)
    # Of the pictures 1 to 3, which have none, the seed draws one.
    drawn = torch.randperm(4, generator=torch.Generator().manual_seed(42))[0]
    assert drawn > 0
    extra = ("--eval-split", "train", "--max-eval-samples", 1, "--max-train-steps", 8)
    output = train(folder, *extra, "--epochs", 2)
    assert output.count("No evaluated picture has a box: AP cannot tell what is best.") == 2
    assert read_metrics(folder / "out" / "best")["epoch"] == 2


def test_crowded_and_very_long_pictures_are_trained_on(tmp_path):
    folder = tmp_path / "data"
    content = write_coco(folder, num_pictures=2)
    picture(8000, 200).save(folder / "1.jpg")
    content["images"][1].update(width=8000, height=200)
    content["annotations"][1]["bbox"] = [4000, 50, 900, 100]
    content["annotations"] += [
        {**content["annotations"][0], "id": 10 + number, "bbox": [number % 40, 6, 15, 30]}
        for number in range(10_000)
    ]
    save(folder, content)
    output = train(folder, "--eval-split", "train", "--max-train-steps", 4)
    assert list(losses(output)) == [1, 2, 3, 4]
    assert read_metrics(folder / "out" / "best")["map"] >= 0
