"""COCO json files as rows in the usual columns of the Hub."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import datasets

from hf_querydet.data.labels import CategoryId

# Names under which the usual tools put the annotations beside the pictures.
COCO_FILE_NAMES = ("instances.json", "_annotations.coco.json")
NEEDED_FIELDS = {"images": ("id", "file_name"), "categories": ("id", "name")}
# How many pictures are looked for before a picture folder is taken for the wrong one.
NUM_PICTURES_LOOKED_FOR = 50


def load_coco_rows(
    json_file: Path, picture_dir: Path | None = None
) -> tuple[datasets.Dataset, dict[CategoryId, str]]:
    """Read an annotation file of COCO's object detection format.

    Pictures without annotations stay in.

    Args:
        json_file: File with the lists ``images``, ``annotations`` and ``categories``.
        picture_dir: Folder that the ``file_name`` of a picture starts from; the folder of
            ``json_file`` if not given.

    Returns:
        Rows with the columns image, image_id, width, height and objects, in the order of
        ``images``, and the name of each category id.

    Raises:
        ValueError: If the file is not of that format, lacks a field, has no pictures, or an
            annotation belongs to none of them.
        FileNotFoundError: If the pictures are not in ``picture_dir``.
    """
    content = _read_json(json_file)
    _check_fields(json_file, content)
    names = _category_names(content)
    picture_dir = picture_dir or json_file.parent
    _check_image_ids(json_file, content)
    _check_picture_dir(json_file, content["images"], picture_dir)

    annotations = defaultdict(list)
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    rows = [_row(image, annotations[image["id"]], picture_dir) for image in content["images"]]
    return datasets.Dataset.from_list(rows, features=_features(names, rows)), names


def _category_names(content: dict[str, Any]) -> dict[CategoryId, str]:
    """Name of each category id, without supercategories and repetitions that have no annotations.

    Exports with supercategories list those too, before their members and often under the same name.
    Where no id of a name has annotations, the last stands for it.
    """
    used = {annotation.get("category_id") for annotation in content["annotations"]}
    parents = {
        category.get("supercategory")
        for category in content["categories"]
        if category.get("supercategory") != category["name"]  # as COCO's person
    }
    names = {
        category["id"]: str(category["name"])
        for category in content["categories"]
        if category["id"] in used or category["name"] not in parents
    }
    used_names = {names[category] for category in used if category in names}
    last = {name: category for category, name in names.items()}
    return {
        category: name
        for category, name in names.items()
        if category in used or (name not in used_names and category == last[name])
    }


def _row(image: dict[str, Any], annotations: list[dict[str, Any]], picture_dir: Path) -> dict:
    return {
        "image": {"bytes": None, "path": str(_picture_path(picture_dir, image["file_name"]))},
        "image_id": image["id"],
        "width": image.get("width"),
        "height": image.get("height"),
        "objects": {
            "bbox": [annotation.get("bbox") for annotation in annotations],
            "category_id": [annotation.get("category_id") for annotation in annotations],
            "area": [annotation.get("area") for annotation in annotations],
            "iscrowd": [annotation.get("iscrowd") for annotation in annotations],
        },
    }


def _picture_path(picture_dir: Path, file_name: str) -> Path:
    """Place of a picture, also where the file was written on Windows and is read elsewhere."""
    path = picture_dir / file_name
    if "\\" not in file_name or path.is_file():
        return path
    return picture_dir / file_name.replace("\\", "/")


def _features(names: dict[CategoryId, str], rows: list[dict]) -> datasets.Features:
    """Types of the columns, stated because the first rows may be empty lists."""
    strings = any(isinstance(category, str) for category in names)
    string_ids = any(isinstance(row["image_id"], str) for row in rows)
    number = datasets.Value("float64")
    objects = {
        "bbox": datasets.List(datasets.List(number)),
        "category_id": datasets.List(datasets.Value("string" if strings else "int64")),
        "area": datasets.List(number),
        "iscrowd": datasets.List(datasets.Value("int64")),
    }
    return datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "image_id": datasets.Value("string" if string_ids else "int64"),
            "width": datasets.Value("int64"),
            "height": datasets.Value("int64"),
            "objects": objects,
        }
    )


def _read_json(json_file: Path) -> dict[str, Any]:
    try:
        # With or without the mark that tools on Windows write first.
        content = json.loads(json_file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{json_file} is not valid json: {error}") from error
    keys = ("images", "annotations", "categories")
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(
            f"{json_file} lacks {missing}; a COCO file holds the lists images, annotations and "
            "categories."
        )
    return content


def _check_fields(json_file: Path, content: dict[str, Any]) -> None:
    """Name the fields that are missing where nothing could stand for them."""
    for key, fields in NEEDED_FIELDS.items():
        for number, entry in enumerate(content[key]):
            missing = [field for field in fields if field not in entry]
            if missing:
                raise ValueError(
                    f"{json_file}: {key}[{number}] lacks {missing}, it has {sorted(entry)}."
                )


def _check_image_ids(json_file: Path, content: dict[str, Any]) -> None:
    if not content["images"]:
        raise ValueError(f"{json_file} has no pictures: its list images is empty.")
    counts = Counter(image["id"] for image in content["images"])
    repeated = [image_id for image_id, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(f"{json_file} has several pictures of image_id {repeated[:10]}.")
    for annotation in content["annotations"]:
        if annotation.get("image_id") not in counts:
            raise ValueError(
                f"{json_file}: annotation {annotation.get('id')} belongs to image_id "
                f"{annotation.get('image_id')!r}, which is not among the images."
            )


def _check_picture_dir(json_file: Path, images: list[dict[str, Any]], picture_dir: Path) -> None:
    """Tell a wrong folder from single missing pictures, which are reported one by one later."""
    some = images[:NUM_PICTURES_LOOKED_FOR]
    looked_for = [_picture_path(picture_dir, image["file_name"]) for image in some]
    if looked_for and not any(path.is_file() for path in looked_for):
        raise FileNotFoundError(
            f"No picture of {json_file} found, for example not {looked_for[0]}; "
            "picture_dir must be the folder that file_name starts from."
        )
