import json
import math

import datasets
import pytest
from detection_data import OBJECTS, SIZES, write_coco, write_image_folder, write_picture
from PIL import Image

from hf_querydet.data import (
    BadExampleError,
    DetectionDataset,
    IterableDetectionDataset,
    load_detection_dataset,
)

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 11, "name": "owl"}]
COCO_OBJECTS = [
    [
        {"bbox": [5.0, 4.0, 20.0, 11.0], "category_id": 3, "area": 150.5, "iscrowd": 0},
        {"bbox": [30.0, 20.0, 9.0, 15.0], "category_id": 7, "area": 90, "iscrowd": 1},
    ],
    [],
    [{"bbox": [1.0, 2.0, 30.0, 25.0], "category_id": 7}],
]


def annotations_of(dataset):
    return [item["annotations"] for item in dataset]


def table_rows(category):
    """Rows in the Hub's columns, objects as a mapping of lists."""
    return {
        "image": [None, None],
        "image_id": [4, 2],
        "objects": [
            {"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": [category]},
            {"bbox": [], "category": []},
        ],
    }


def write_table(folder, rows, features=None, split="train"):
    """A local dataset in the Hub's layout: a parquet file with the pictures inside."""
    folder.mkdir(exist_ok=True)
    for number in range(len(rows["image"])):
        path = folder.parent / f"{number}.png"
        write_picture(path, SIZES[number], seed=number)
        rows["image"][number] = {"bytes": path.read_bytes(), "path": path.name}
        path.unlink()
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.cast_column("image", datasets.Image()).to_parquet(folder / f"{split}.parquet")
    return folder


def test_table_below_the_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_table(tmp_path / "pets", table_rows("cat"))
    assert load_detection_dataset("~/pets", split="train").id2label == {0: "cat"}


def test_image_folder_gives_pictures_and_annotations(image_folder):
    dataset = load_detection_dataset(image_folder, split="train")

    assert isinstance(dataset, DetectionDataset)
    assert dataset.id2label == {0: "ant", 1: "cat", 2: "dog"}
    assert [item["image"].size for item in dataset] == SIZES
    assert annotations_of(dataset)[:2] == [
        {
            "image_id": 10,
            "annotations": [
                {"bbox": [5.0, 4.0, 20.0, 11.0], "category_id": 1, "area": None, "iscrowd": 0},
                {"bbox": [30.0, 20.0, 9.0, 15.0], "category_id": 2, "area": None, "iscrowd": 0},
            ],
        },
        {"image_id": 13, "annotations": []},
    ]


def test_folders_named_after_splits_are_found_and_numbered_by_the_training_split(tmp_path):
    write_image_folder(tmp_path / "train")
    write_image_folder(tmp_path / "validation", OBJECTS[2:3], first_id=90)

    train = load_detection_dataset(tmp_path, split="train")
    validation = load_detection_dataset(tmp_path, split="validation", label_table=train.label_table)

    assert (len(train), len(validation)) == (4, 1)
    assert validation.id2label == train.id2label
    # Alone it would be 0: the only category of this split.
    assert annotations_of(validation)[0]["annotations"][0]["category_id"] == 2


def write_metadata_above(root, folders, objects=OBJECTS):
    """Pictures in one folder each, and one metadata.jsonl above all of them."""
    lines = []
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        write_picture(root / folder / f"{number}.png", SIZES[number], seed=number)
        row = {"file_name": f"{folder}/{number}.png", "image_id": number, "objects": objects[0]}
        lines.append(json.dumps(row))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("prefix", ["", "images/"])
def test_folders_of_splits_below_one_metadata_file_are_splits(tmp_path, prefix, streaming):
    # The name of a split also stands above, where it says nothing.
    folders = [prefix + split for split in ("train", "val2017", "train")]
    root = write_metadata_above(tmp_path / "validation" / "pets", folders)
    options = {"streaming": streaming, "label_names": ["cat", "dog"] if streaming else None}

    train = load_detection_dataset(root, split="train", **options)
    validation = load_detection_dataset(root, split="val2017", **options)

    assert [each["image_id"] for each in annotations_of(train)] == [0, 2]
    assert [each["image_id"] for each in annotations_of(validation)] == [1]
    assert [item["image"].size for item in train] == [SIZES[0], SIZES[2]]
    message = r"no picture in a folder 'validation'; .* its splits are \['train', 'val2017'\]"
    with pytest.raises(ValueError, match=message):
        load_detection_dataset(root, split="validation", **options)


def test_folders_that_are_no_splits_are_one_split_together(tmp_path):
    root = write_metadata_above(tmp_path / "pets", ["indoors", "outdoors"])

    assert len(load_detection_dataset(root, split="train")) == 2


def test_a_broken_line_of_metadata_is_named(image_folder):
    with (image_folder / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "4.png"')

    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 5, is not valid json"):
        load_detection_dataset(image_folder, split="train")


def test_splits_of_a_folder_of_coco_jsons_are_listed(tmp_path):
    for split in ("train", "valid"):
        json_file = tmp_path / split / "_annotations.coco.json"
        write_coco(json_file, tmp_path / split, CATEGORIES, COCO_OBJECTS)

    message = r"has no split 'validation'; its splits are \['train', 'valid'\]"
    with pytest.raises(ValueError, match=message):
        load_detection_dataset(tmp_path, split="validation")


@pytest.mark.parametrize(
    ("files", "name", "found"),
    [
        (["JPEGImages/a.jpg", "Annotations/a.xml"], "Pascal VOC", "Annotations/a.xml"),
        (["train/a.jpg", "train/a.xml"], "Pascal VOC", "train/a.xml"),
        (["images/train/a.jpg", "labels/train/a.txt"], "YOLO", "labels/train/a.txt"),
        (["train/images/a.jpg", "data.yaml"], "YOLO", "data.yaml"),
    ],
    ids=["voc", "voc-beside", "yolo", "yolo-yaml"],
)
def test_formats_that_are_not_read_are_named(tmp_path, files, name, found):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("text")
    write_picture(tmp_path / files[0], SIZES[0])

    message = rf"looks like {name} \({found}\), which is not read: convert it to a COCO json \(docs"
    with pytest.raises(ValueError, match=message):
        load_detection_dataset(tmp_path, split="train")


def test_what_datasets_cannot_read_is_an_error_with_its_cause(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"image": 1}\n{"image": ')

    with pytest.raises(ValueError, match=r"cannot be read\. .*JSON"):
        load_detection_dataset(tmp_path, split="train")


def test_a_file_that_is_no_json_is_an_error(image_folder):
    with pytest.raises(ValueError, match=r"metadata\.jsonl is a file, but no COCO json\. Name its"):
        load_detection_dataset(image_folder / "metadata.jsonl", split="train")


def test_a_folder_may_hold_glob_characters_and_split_names_in_its_files(tmp_path):
    folder = write_image_folder(tmp_path / "[1] pets*")
    (folder / "0.png").rename(folder / "test-0.png")
    metadata = (folder / "metadata.jsonl").read_text().replace('"0.png"', '"test-0.png"')
    (folder / "metadata.jsonl").write_text(metadata)

    assert len(load_detection_dataset(folder, split="train")) == 4


def test_coco_json_keeps_names_areas_and_crowds(tmp_path):
    write_coco(tmp_path / "instances.json", tmp_path, CATEGORIES, COCO_OBJECTS)

    dataset = load_detection_dataset(tmp_path / "instances.json", split="train")

    # In the order of the ids 3, 7, 11, whatever the order in the file.
    assert dataset.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert dataset.label_to_category == {0: 3, 1: 7, 2: 11}
    assert annotations_of(dataset) == [
        {
            "image_id": 0,
            "annotations": [
                {"bbox": [5.0, 4.0, 20.0, 11.0], "category_id": 0, "area": 150.5, "iscrowd": 0},
                {"bbox": [30.0, 20.0, 9.0, 15.0], "category_id": 1, "area": 90.0, "iscrowd": 1},
            ],
        },
        {"image_id": 1, "annotations": []},
        {
            "image_id": 2,
            "annotations": [
                {"bbox": [1.0, 2.0, 30.0, 25.0], "category_id": 1, "area": None, "iscrowd": 0}
            ],
        },
    ]


@pytest.mark.parametrize("file_name", ["instances.json", "_annotations.coco.json"])
def test_a_folder_with_a_coco_json_is_found(tmp_path, file_name):
    write_coco(tmp_path / "train" / file_name, tmp_path / "train", CATEGORIES, COCO_OBJECTS)

    assert len(load_detection_dataset(tmp_path, split="train")) == 3


def test_split_stands_in_path_and_picture_dir(tmp_path):
    json_file = tmp_path / "annotations" / "instances_val2017.json"
    write_coco(json_file, tmp_path / "val2017", CATEGORIES, COCO_OBJECTS)

    dataset = load_detection_dataset(
        tmp_path / "annotations" / "instances_{split}2017.json",
        split="val",
        picture_dir=tmp_path / "{split}2017",
    )

    assert [item["image"].size for item in dataset] == SIZES[:3]


def test_splits_with_other_category_ids_are_joined_by_name(tmp_path):
    renumbered = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}, {"id": 2, "name": "owl"}]
    objects = [[{"bbox": [1.0, 1.0, 5.0, 5.0], "category_id": 1}]]
    write_coco(tmp_path / "a" / "instances.json", tmp_path / "a", CATEGORIES, COCO_OBJECTS)
    write_coco(tmp_path / "b" / "instances.json", tmp_path / "b", renumbered, objects)
    train = load_detection_dataset(tmp_path / "a", split="train")

    other = load_detection_dataset(tmp_path / "b", split="test", label_table=train.label_table)

    assert annotations_of(other)[0]["annotations"][0]["category_id"] == train.label2id["dog"]
    assert other.label_to_category == {0: 0, 1: 1, 2: 2}


def test_class_label_keeps_its_order(tmp_path):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "image_id": datasets.Value("int32"),
            "objects": {
                "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
                "category": datasets.List(datasets.ClassLabel(names=["zebra", "ant"])),
            },
        }
    )
    folder = write_table(tmp_path / "table", table_rows(1), features)

    dataset = load_detection_dataset(folder, split="train")

    assert dataset.id2label == {0: "zebra", 1: "ant"}
    assert annotations_of(dataset)[0]["annotations"][0]["category_id"] == 1


@pytest.mark.parametrize(
    ("category", "id2label"), [(40, {0: "40"}), ("fish", {0: "fish"})], ids=["number", "string"]
)
def test_categories_without_names(tmp_path, category, id2label):
    folder = write_table(tmp_path / "table", table_rows(category))

    dataset = load_detection_dataset(folder, split="train")

    assert dataset.id2label == id2label
    assert dataset.label_to_category == {0: category}


def test_objects_may_be_a_list_of_mappings(tmp_path):
    rows = table_rows(5)
    rows["objects"] = [[{"bbox": [1.0, 2.0, 3.0, 4.0], "category_id": 5, "iscrowd": True}], []]
    folder = write_table(tmp_path / "table", rows)

    first = annotations_of(load_detection_dataset(folder, split="train"))[0]["annotations"]

    assert first == [{"bbox": [1.0, 2.0, 3.0, 4.0], "category_id": 0, "area": None, "iscrowd": 1}]


def test_categories_may_be_called_as_in_the_guide_to_image_folders(tmp_path):
    objects = {"bbox": [[5.0, 4.0, 20.0, 11.0]], "categories": ["cat"]}
    folder = write_image_folder(tmp_path / "pets", [objects])

    dataset = load_detection_dataset(folder, split="train")

    assert dataset.id2label == {0: "cat"}
    assert annotations_of(dataset)[0]["annotations"][0]["category_id"] == 0


@pytest.mark.parametrize("image_ids", [None, ["b7", "b8"]], ids=["missing", "strings"])
def test_rows_without_a_number_as_image_id_are_counted(tmp_path, image_ids):
    rows = table_rows(5)
    del rows["image_id"]
    if image_ids:
        rows["image_id"] = image_ids
    dataset = load_detection_dataset(write_table(tmp_path / "table", rows), split="train")

    assert [each["image_id"] for each in annotations_of(dataset)] == [0, 1]


def test_a_stream_gives_the_same_as_the_loaded_dataset(image_folder):
    loaded = load_detection_dataset(image_folder, split="train")

    stream = load_detection_dataset(
        image_folder, split="train", streaming=True, label_names=["ant", "cat", "dog"]
    )

    assert isinstance(stream, IterableDetectionDataset)
    assert stream.id2label == loaded.id2label
    assert annotations_of(stream) == annotations_of(loaded)


def test_a_coco_json_can_be_streamed(tmp_path):
    write_coco(tmp_path / "instances.json", tmp_path, CATEGORIES, COCO_OBJECTS)
    stream = load_detection_dataset(tmp_path, split="train", streaming=True)

    loaded = load_detection_dataset(tmp_path, split="train")

    assert annotations_of(stream) == annotations_of(loaded)
    assert stream.label_table == loaded.label_table


def test_a_stream_needs_its_names_beforehand(image_folder):
    with pytest.raises(ValueError, match="streaming=True needs the categories beforehand"):
        load_detection_dataset(image_folder, split="train", streaming=True)


def test_a_dataset_without_the_column_objects_has_no_boxes(tmp_path):
    rows = table_rows(1)
    del rows["objects"]
    folder = write_table(tmp_path / "table", rows)

    with pytest.raises(ValueError, match=r"has no boxes: there is no column objects among"):
        load_detection_dataset(folder, split="train")
    dataset = load_detection_dataset(folder, split="train", require_boxes=False)
    assert annotations_of(dataset)[0] == {"image_id": 4, "annotations": []}


@pytest.mark.parametrize("pass_table", [False, True])
def test_a_dataset_whose_lists_are_all_empty_has_no_boxes(image_folder, tmp_path, pass_table):
    table = load_detection_dataset(image_folder, split="train").label_table
    empty = write_image_folder(tmp_path / "empty", [OBJECTS[1], OBJECTS[1]])
    options = {"label_table": table} if pass_table else {}

    with pytest.raises(ValueError, match=r"objects of all 2 rows of the split 'train' are empty"):
        load_detection_dataset(empty, split="train", **options)
    assert len(load_detection_dataset(empty, split="train", require_boxes=False, **options)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": [{"box": [[1.0]]}] * 2}, r"objects needs bbox and one of .* it has \['box'\]"),
        ({"image": None}, "has no column image, it has"),
        ({"image_id": [4, 4]}, r"image_id must be different in every row, but \[4\] occur"),
    ],
    ids=["no-bbox", "no-image", "repeated-id"],
)
def test_columns_that_are_not_as_described(tmp_path, change, message):
    folder = write_table(tmp_path / "table", table_rows(1))
    rows = datasets.Dataset.from_parquet(str(folder / "train.parquet"))
    for column, values in change.items():
        rows = rows.remove_columns(column)
        rows = rows if values is None else rows.add_column(column, values)
    rows.to_parquet(folder / "train.parquet")

    with pytest.raises(ValueError, match=message):
        load_detection_dataset(folder, split="train")


def test_options_that_contradict_each_other(image_folder):
    table = load_detection_dataset(image_folder, split="train").label_table

    with pytest.raises(ValueError, match="label_names and label_table exclude each other"):
        load_detection_dataset(image_folder, split="train", label_table=table, label_names=["a"])
    with pytest.raises(ValueError, match="picture_dir belongs to a COCO json"):
        load_detection_dataset(image_folder, split="train", picture_dir=image_folder)


def test_a_category_without_annotations_that_shares_a_name_is_left_out(tmp_path):
    categories = [
        {"id": 0, "name": "dog"},
        {"id": 3, "name": "cat"},
        {"id": 7, "name": "dog"},
        {"id": 8, "name": "owl"},
        {"id": 9, "name": "owl"},
    ]
    write_coco(tmp_path / "instances.json", tmp_path, categories, COCO_OBJECTS)

    dataset = load_detection_dataset(tmp_path, split="train")

    assert dataset.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert dataset.label_to_category == {0: 3, 1: 7, 2: 9}


def test_categories_with_annotations_may_not_share_a_name(tmp_path):
    categories = [{"id": 3, "name": "dog"}, {"id": 7, "name": "dog"}]
    write_coco(tmp_path / "instances.json", tmp_path, categories, COCO_OBJECTS)

    with pytest.raises(ValueError, match=r"Two categories share one name: \['dog'\]"):
        load_detection_dataset(tmp_path, split="train")


@pytest.mark.parametrize("annotation_id", ["a1", 10**20], ids=["text", "huge"])
def test_ids_of_annotations_may_be_anything(tmp_path, annotation_id):
    objects = [[{**COCO_OBJECTS[0][0], "id": annotation_id}]]
    write_coco(tmp_path / "instances.json", tmp_path, CATEGORIES, objects)

    assert len(load_detection_dataset(tmp_path, split="train")) == 1


def test_a_coco_json_may_begin_with_a_byte_order_mark(tmp_path):
    json_file = write_coco(tmp_path / "instances.json", tmp_path, CATEGORIES, COCO_OBJECTS)
    json_file.write_text(json_file.read_text(), encoding="utf-8-sig")

    assert len(load_detection_dataset(tmp_path, split="train")) == 3


def test_a_coco_json_that_is_missing_or_broken(tmp_path):
    broken, partial = tmp_path / "broken.json", tmp_path / "partial.json"
    broken.write_text('{"images": [')
    partial.write_text('{"images": []}')

    with pytest.raises(FileNotFoundError, match=r"gone\.json does not exist"):
        load_detection_dataset(tmp_path / "gone.json", split="train")
    with pytest.raises(ValueError, match=r"broken\.json is not valid json"):
        load_detection_dataset(broken, split="train")
    with pytest.raises(ValueError, match=r"lacks \['annotations', 'categories'\]"):
        load_detection_dataset(partial, split="train")


def test_an_empty_metadata_file_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.jsonl").write_text("\n")

    with pytest.raises(ValueError, match=r"metadata\.jsonl has no pictures: it is empty"):
        load_detection_dataset(tmp_path, split="train")


def test_metadata_in_another_encoding_is_named(image_folder):
    (image_folder / "metadata.jsonl").write_bytes('{"file_name": "ä.png"}'.encode("latin-1"))

    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1, is not UTF-8 text"):
        load_detection_dataset(image_folder, split="train")


def test_metadata_of_unlike_lines_is_named(image_folder):
    (image_folder / "metadata.jsonl").write_text('[{"file_name": "0.png"}]')

    with pytest.raises(ValueError, match=f"The split 'train' of {image_folder} cannot be read"):
        load_detection_dataset(image_folder, split="train")


@pytest.mark.parametrize("has_pictures", [True, False])
def test_a_split_without_metadata_is_named(tmp_path, has_pictures):
    write_image_folder(tmp_path / "train")
    if has_pictures:
        write_image_folder(tmp_path / "validation")
        (tmp_path / "validation" / "metadata.jsonl").unlink()

    with pytest.raises(
        ValueError, match=r"is a folder of pictures with a metadata\.jsonl, or a COCO"
    ):
        load_detection_dataset(tmp_path, split="validation")


def test_a_dataset_in_memory_is_an_error_with_its_remedy():
    with pytest.raises(TypeError, match=r"got Dataset\. Write a dataset .* to_parquet"):
        load_detection_dataset(datasets.Dataset.from_dict(table_rows("cat")), split="train")


@pytest.mark.parametrize("pass_table", [False, True])
def test_boxes_in_shares_of_the_picture_are_an_error(image_folder, tmp_path, pass_table):
    table = load_detection_dataset(image_folder, split="train").label_table if pass_table else None
    boxes = [{"bbox": [[0.1, 0.2, 0.5, 1.0]], "category": ["cat"]}, {"bbox": [], "category": []}]
    folder = write_image_folder(tmp_path / "shares", boxes)

    with pytest.raises(ValueError, match=r"not in pixels: no coordinate of 1 boxes is above 1\."):
        load_detection_dataset(folder, split="train", label_table=table)


def as_corners(objects):
    """The same objects with boxes as left, top, right, bottom."""
    return [
        {**each, "bbox": [[x, y, x + width, y + height] for x, y, width, height in each["bbox"]]}
        for each in objects
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_boxes_that_are_corners_are_read_as_such(image_folder, tmp_path, streaming):
    options = {"streaming": streaming, "label_names": ["ant", "cat", "dog"]}
    expected = load_detection_dataset(image_folder, split="train", **options)
    folder = write_image_folder(tmp_path / "corners", as_corners(OBJECTS))

    dataset = load_detection_dataset(folder, split="train", box_format="xyxy", **options)

    assert annotations_of(dataset) == annotations_of(expected)
    assert any(each["annotations"] for each in annotations_of(dataset))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([9.0, 4.0, 8.0, 11.0], r"right not below left .* got \[9\.0, 4\.0, 8\.0, 11\.0\]"),
        (
            [9.0, 4.0, 18.0, 3.5],
            r"bottom not below top.*; \[left, top, width, height\] is box_format",
        ),
        ([9.0, 4.0, 18.0], r"4 numbers, \[left, top, right, bottom\]; got \[9\.0, 4\.0, 18\.0\]"),
        ([9.0, 4.0, 18.0, None], "4 numbers"),
        ([9.0, 4.0, 18.0, math.inf], "finite numbers"),
    ],
)
def test_corners_that_are_none_are_named(tmp_path, box, message):
    folder = write_image_folder(tmp_path / "pets", [{"bbox": [box], "category": ["cat"]}])
    dataset = load_detection_dataset(folder, split="train", box_format="xyxy")

    with pytest.raises(BadExampleError, match=rf"row 0 .*{message}"):
        dataset[0]


# Corners that, taken for sizes, reach beyond pictures of 61x43, 38x57 and 75x31.
CORNERS = [
    {"bbox": [[5.0, 4.0, 25.0, 15.0], [30.0, 20.0, 39.0, 35.0]], "category": ["cat", "dog"]},
    {"bbox": [[1.0, 40.0, 20.0, 55.0]], "category": ["cat"]},
    {"bbox": [], "category": []},
]


def test_boxes_that_look_like_corners_are_an_error(tmp_path):
    folder = write_image_folder(tmp_path / "pets", CORNERS)

    message = r"split 'train' look like left, top, right, bottom: .* 2 of 3 .* box_format='xyxy'"
    with pytest.raises(ValueError, match=message):
        load_detection_dataset(folder, split="train")


@pytest.mark.parametrize(
    "objects",
    [
        # One that is narrower than its left edge is far from the picture's.
        [*CORNERS, {"bbox": [[7.0, 8.0, 6.9, 20.0]], "category": ["cat"]}],
        # Beyond, but by less than a twentieth of 61 and 43.
        [{"bbox": [[30.0, 20.0, 34.0, 25.0]], "category": ["cat"]}],
        # One in four beyond.
        [{"bbox": [*[[5.0, 4.0, 25.0, 15.0]] * 3, [30.0, 20.0, 39.0, 35.0]], "category": [""] * 4}],
    ],
    ids=["narrow", "slightly", "few"],
)
def test_boxes_that_may_be_sizes_are_taken_for_them(tmp_path, objects):
    folder = write_image_folder(tmp_path / "pets", objects)

    assert len(load_detection_dataset(folder, split="train")) == len(objects)


def test_boxes_that_look_like_corners_are_sizes_if_that_is_said(tmp_path):
    folder = write_image_folder(tmp_path / "pets", CORNERS)

    dataset = load_detection_dataset(folder, split="train", box_format="xywh")

    assert dataset[0]["annotations"]["annotations"][0]["bbox"] == [5.0, 4.0, 25.0, 15.0]


def test_boxes_of_a_turned_picture_are_compared_with_its_upright_size(tmp_path):
    # Stored as 61x43, shown as 43x61: the box ends at 40, 60.
    folder = write_image_folder(
        tmp_path / "pets", [{"bbox": [[5.0, 10.0, 35.0, 50.0]], "category": ["cat"]}]
    )
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(folder / "0.png").save(folder / "0.png", exif=turned)

    assert load_detection_dataset(folder, split="train")[0]["image"].size == (43, 61)


def test_a_path_that_is_not_there_is_said_not_to_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    message = "pets/dgs is no folder or file here, and as a dataset of the Hub it could not be"
    with pytest.raises(FileNotFoundError, match=message):
        load_detection_dataset("pets/dgs", split="train")


def test_an_unknown_box_format_is_an_error(image_folder):
    with pytest.raises(ValueError, match="box_format must be 'xywh' or 'xyxy', got 'cxcywh'"):
        load_detection_dataset(image_folder, split="train", box_format="cxcywh")


def test_a_line_for_each_box_is_an_error(tmp_path):
    box = {"bbox": [[5.0, 4.0, 20.0, 11.0]], "category": ["cat"]}
    folder = write_image_folder(tmp_path / "pets", [box, box])
    row = json.dumps({"file_name": "1.png", "image_id": 99, "objects": box})
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n" + row)

    with pytest.raises(ValueError, match=r"must stand in one row, .*1\.png'\] stand in several"):
        load_detection_dataset(folder, split="train")


def test_file_names_of_windows_are_found(tmp_path):
    json_file = write_coco(tmp_path / "a.json", tmp_path / "photos", CATEGORIES, COCO_OBJECTS)
    json_file.write_text(json_file.read_text().replace('"photo ', r'"photos\\photo '))

    dataset = load_detection_dataset(json_file, split="train")

    assert [item["image"].size for item in dataset] == SIZES[:3]


def test_a_supercategory_is_no_class(tmp_path):
    json_file = write_coco(tmp_path / "a.json", tmp_path, CATEGORIES, COCO_OBJECTS)
    content = json.loads(json_file.read_text())
    pets = [{**each, "supercategory": "pets"} for each in content["categories"]]
    # One that nothing belongs to, and one that is its own, as COCO has it, are classes.
    person = {"id": 21, "name": "person", "supercategory": "person"}
    content["categories"] = [{"id": 0, "name": "pets", "supercategory": "none"}, *pets, person]
    json_file.write_text(json.dumps(content))

    dataset = load_detection_dataset(json_file, split="train")

    assert dataset.id2label == {0: "cat", 1: "dog", 2: "owl", 3: "person"}


def test_a_supercategory_with_objects_is_a_class(tmp_path):
    categories = [{**each, "supercategory": "dog"} for each in CATEGORIES]
    json_file = write_coco(tmp_path / "a.json", tmp_path, categories, COCO_OBJECTS)

    dataset = load_detection_dataset(json_file, split="train")

    assert dataset.id2label == {0: "cat", 1: "dog", 2: "owl"}


def test_a_folder_with_a_json_of_another_name_says_so(tmp_path):
    write_coco(tmp_path / "annotations" / "pets.json", tmp_path / "images", CATEGORIES, [[]])

    with pytest.raises(ValueError, match=r"If .*annotations/pets\.json is a COCO json, pass it"):
        load_detection_dataset(tmp_path, split="train")


def test_a_wrong_picture_dir_is_named_at_once(tmp_path):
    json_file = write_coco(tmp_path / "a.json", tmp_path / "photos", CATEGORIES, COCO_OBJECTS)

    with pytest.raises(FileNotFoundError, match="picture_dir must be the folder"):
        load_detection_dataset(json_file, split="train")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content["images"].append(content["images"][1]), r"image_id \[1\]"),
        (
            lambda content: content["annotations"][0].update(image_id=55),
            r"annotation 0 belongs to image_id 55, which is not among the images",
        ),
        (lambda content: content["images"].clear(), r"a\.json has no pictures"),
        (
            lambda content: content["images"][1].pop("id"),
            r"a\.json: images\[1\] lacks \['id'\], it has \['file_name', 'height', 'width'\]",
        ),
        (lambda content: content["images"][0].pop("file_name"), r"images\[0\] lacks \['file_name'"),
        (lambda content: content["categories"][2].pop("name"), r"categories\[2\] lacks \['name'\]"),
        (lambda content: content["categories"][1].pop("id"), r"categories\[1\] lacks \['id'\]"),
    ],
    ids=[
        "repeated-picture",
        "orphan",
        "no-picture",
        "no-image-id",
        "no-file-name",
        "no-category-name",
        "no-category-id",
    ],
)
def test_a_coco_json_that_contradicts_itself(tmp_path, edit, message):
    json_file = write_coco(tmp_path / "a.json", tmp_path, CATEGORIES, COCO_OBJECTS)
    content = json.loads(json_file.read_text())
    edit(content)
    json_file.write_text(json.dumps(content))

    with pytest.raises(ValueError, match=message):
        load_detection_dataset(json_file, split="train")
