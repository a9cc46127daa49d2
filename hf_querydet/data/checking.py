"""What can be said against a split before any of its pictures is used."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

from hf_querydet.data.labels import CategoryId
from hf_querydet.data.reading import RowReader, objects_as_columns, picture_size

# Rows that are looked at to tell corners from sizes.
NUM_SAMPLED = 100
# Of such a row's boxes, taken for sizes: how far one must reach beyond its picture, in shares of
# its side, to count, and the share of boxes that must. Careless or amodal boxes reach beyond too.
CLEARLY_BEYOND = 0.05
MANY_BEYOND = 0.25


def check_boxes(
    rows: datasets.Dataset, split: str, require_boxes: bool, category_key: str
) -> set[CategoryId]:
    """Raise if there is no box, or none in pixels; returns the categories that occur."""
    categories, num_boxes, is_in_pixels = set(), 0, False
    if "objects" in rows.column_names:
        for batch in rows.select_columns("objects").iter(batch_size=1000):
            for objects in _as_rows(batch["objects"]):
                columns = objects_as_columns(objects)
                boxes = columns.get("bbox") or []
                num_boxes += len(boxes)
                # What is no box is reported with its row when it is read.
                is_in_pixels = is_in_pixels or not all(map(_is_unit_box, boxes))
                categories.update(columns.get(category_key) or [])
    if require_boxes and num_boxes == 0:
        raise ValueError(
            f"The dataset has no boxes: the objects of all {len(rows)} rows of the split {split!r} "
            "are empty."
        )
    if num_boxes and not is_in_pixels:
        raise ValueError(
            f"The boxes of the split {split!r} are not in pixels: no coordinate of {num_boxes} "
            "boxes is above 1. Multiply them by the width and height of their pictures."
        )
    return categories - {None}


def _is_unit_box(box: Any) -> bool:
    """Whether it could be a box in shares of its picture."""
    try:
        return all(0 <= coordinate <= 1 for coordinate in box)
    except TypeError:
        return False


def _as_rows(batch: Any) -> list[Any]:
    """The objects of several pictures, one by one."""
    if isinstance(batch, Mapping):
        keys = list(batch)
        return [
            dict(zip(keys, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
    return batch


def check_categories(
    rows: datasets.Dataset, reader: RowReader, categories: set[CategoryId]
) -> None:
    """Raise for the first row with a category that has no label.

    Args:
        rows: The rows.
        reader: Knows the labels.
        categories: That occur.
    """
    if categories <= set(reader.label_table.category_to_label):
        return
    for row_number, row in enumerate(rows):
        reader.check_categories(row, row_number)


def check_for_corners(rows: datasets.Dataset, split: str) -> None:
    """Raise if boxes that are taken for left, top, width, height look like corners.

    That is: none is narrower than its left edge is far from the picture's, or lower than its top
    edge is, which of sizes would be strange, and many reach far beyond their pictures.
    """
    if "objects" not in rows.column_names:
        return
    num_boxes, num_beyond = 0, 0
    for row in rows.select(range(0, len(rows), max(len(rows) // NUM_SAMPLED, 1))):
        boxes = _box_array(objects_as_columns(row["objects"]).get("bbox"))
        size = picture_size(row["image"]) if len(boxes) else None
        if size is None:
            continue  # said with its row when it is read
        if (boxes[:, 2:] < boxes[:, :2]).any():
            return
        ends = boxes[:, :2] + boxes[:, 2:]
        num_boxes += len(boxes)
        num_beyond += int((ends > np.multiply(size, 1 + CLEARLY_BEYOND)).any(axis=1).sum())
    if num_beyond > MANY_BEYOND * num_boxes:
        raise ValueError(
            f"The boxes of the split {split!r} look like left, top, right, bottom: taken for left, "
            f"top, width, height, {num_beyond} of {num_boxes} reach far beyond their pictures. "
            "Pass box_format='xyxy', or 'xywh' if that is what they are (--box-format)."
        )


def _box_array(boxes: Any) -> np.ndarray:
    """Boxes as (n, 4); none where they have another form, which is said when they are read."""
    try:
        return np.asarray(boxes or [], dtype=np.float64).reshape(-1, 4)
    except (TypeError, ValueError):
        return np.zeros((0, 4))


def check_picture_files(rows: datasets.Dataset) -> None:
    """Raise if a file stands in several rows: each would lack the boxes of the others."""
    if len(rows) == 0 or "image" not in rows.column_names:
        return
    pictures = rows.select_columns("image")
    if (pictures[0]["image"] or {}).get("bytes") is not None:
        return  # in the rows themselves; their names need not be unique
    counts = Counter(
        image["path"]
        for batch in pictures.iter(batch_size=1000)
        for image in batch["image"]
        if image is not None and image["bytes"] is None
    )
    repeated = [path for path, count in counts.items() if path and count > 1]
    if repeated:
        raise ValueError(
            f"A picture must stand in one row, with all its boxes, but {repeated[:3]} stand in "
            f"several ({len(repeated)} such pictures). Join their rows."
        )


def check_image_ids(rows: datasets.Dataset, reader: RowReader) -> None:
    """Raise if two rows have one image id."""
    if not reader.has_image_ids:
        return
    counts = Counter(rows["image_id"])
    repeated = [image_id for image_id, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(
            f"image_id must be different in every row, but {repeated[:10]} occur more than once "
            f"({len(repeated)} such ids); results could not be told apart."
        )
