"""From a row of a dataset to a picture and its annotations, checked."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from hf_querydet.coco_annotations import prepare_labels
from hf_querydet.data.labels import LabelTable
from hf_querydet.image_reading import turn_upright

# The second is COCO's, the third that of Hugging Face's guide to image folders.
CATEGORY_KEYS = ("category", "category_id", "categories")


class BadExampleError(ValueError):
    """A row that cannot be used: its picture cannot be read or its annotations are wrong."""


@dataclass(frozen=True)
class RowReader:
    """Reads one row of a dataset in the usual columns of the Hub.

    Columns: ``image`` (undecoded: path and bytes), ``image_id`` (optional), ``objects`` with
    ``bbox`` (COCO: left, top, width, height in pixels), ``category``, ``category_id`` or
    ``categories``, and optionally ``area`` and ``iscrowd``; either a mapping of lists or a list of
    mappings. Where ``width`` and ``height`` are among the columns, see ``checks_sizes``.

    Attributes:
        label_table: From the dataset's categories to labels.
        category_key: Key of the category in ``objects``.
        has_image_ids: Whether the ``image_id`` column holds whole numbers. Where it does not, the
            number of the row stands for it.
        checks_sizes: Whether the columns ``width`` and ``height`` must be those of the picture, as
            in a COCO json. Elsewhere they may say something else, so that only one thing about them
            is an error: that they are the size of a picture that EXIF turns.
    """

    label_table: LabelTable
    category_key: str
    has_image_ids: bool
    checks_sizes: bool = False

    def image_id(self, row: Mapping[str, Any], row_number: int) -> int:
        """Number that identifies the picture of a row in results."""
        return row["image_id"] if self.has_image_ids else row_number

    def read(self, row: Mapping[str, Any], row_number: int) -> tuple[Image.Image, dict[str, Any]]:
        """Picture and annotations of one row.

        Args:
            row: One row of the dataset, its picture undecoded.
            row_number: Its number, for messages and for datasets without image ids.

        Returns:
            The picture, upright as its EXIF orientation says, and the annotations as an image
            processor takes them: ``{"image_id": ..., "annotations": [{"bbox", "category_id",
            "area", "iscrowd"}, ...]}``, where ``category_id`` is a label.

        Raises:
            BadExampleError: If the picture or an annotation cannot be used. The message names the
                row, the image id and the file.
        """
        try:
            image, stored_size = _decode(row["image"])
            self._check_size(row, image.size, stored_size)
            annotations = self._annotations(row.get("objects"))
            annotation_set = {
                "image_id": self.image_id(row, row_number),
                "annotations": annotations,
            }
            # Only for its checks, which belong before any augmentation: afterwards a box outside
            # the picture could not be told from one that was cropped away.
            size = (image.height, image.width)
            prepare_labels(annotation_set, original_size=size, resized_size=size)
        except (TypeError, ValueError) as error:
            raise BadExampleError(f"{self.describe(row, row_number)}: {error}") from error
        return image, annotation_set

    def describe(self, row: Mapping[str, Any], row_number: int) -> str:
        """Row, image id and file, for messages."""
        file = (row["image"] or {}).get("path") or "stored in the dataset"
        return f"row {row_number} (image_id {row.get('image_id', row_number)}, file {file})"

    def _check_size(
        self, row: Mapping[str, Any], upright: tuple[int, int], stored: tuple[int, int]
    ) -> None:
        """Raise if boxes were measured on a picture of another size, as far as the row says so."""
        size = row.get("width"), row.get("height")
        if not all(isinstance(side, int) and side > 0 for side in size) or size == upright:
            return
        (width, height), shown = size, "x".join(map(str, upright))
        if size == stored:
            raise ValueError(
                f"width and height say {width}x{height}, but by its EXIF orientation the picture "
                f"is {shown}, and boxes belong to the upright picture. If they were drawn without "
                "regard to EXIF, remove the orientation from the file (exiftool -Orientation= "
                "FILE); if they were drawn on the upright picture, swap width and height."
            )
        if self.checks_sizes:
            raise ValueError(
                f"width and height say {width}x{height}, but the picture is {shown}; bring the "
                "boxes to the picture's pixels and correct width and height, or take the pictures "
                "that the boxes were drawn on."
            )

    def _annotations(self, objects: Any) -> list[dict[str, Any]]:
        columns = objects_as_columns(objects)
        bboxes = columns.get("bbox") or []
        categories = columns.get(self.category_key) or []
        if len(bboxes) != len(categories):
            raise ValueError(
                f"objects has {len(bboxes)} values of bbox but {len(categories)} of "
                f"{self.category_key}; each object needs both."
            )
        if not bboxes:
            return []
        areas = _optional(columns, "area", len(bboxes))
        iscrowd = _optional(columns, "iscrowd", len(bboxes))
        return [
            {
                "bbox": bbox,
                "category_id": self.label_table.label_of(category),
                "area": area,
                "iscrowd": crowd or 0,
            }
            for bbox, category, area, crowd in zip(bboxes, categories, areas, iscrowd, strict=True)
        ]


def objects_as_columns(objects: Any) -> dict[str, list[Any]]:
    """The objects of a picture as a mapping of lists, whichever of the two forms they came in."""
    if not objects:
        return {}
    if isinstance(objects, Mapping):
        return dict(objects)
    return {key: [each.get(key) for each in objects] for key in objects[0]}


def _decode(image: Mapping[str, Any] | None) -> tuple[Image.Image, tuple[int, int]]:
    """The picture, upright, and its (width, height) before it was turned."""
    if image is None:
        raise ValueError("the image column is empty.")
    try:
        # Read here, because datasets leaves a local file open if decoding fails, and refuses a
        # picture with EXIF data that cannot be read.
        path, content = image.get("path"), image.get("bytes")
        if content is None and path is not None and Path(path).is_file():
            content = Path(path).read_bytes()
        if content is None:  # a stream's, which datasets fetches
            fetched = datasets.Image().decode_example({"path": path, "bytes": None})
            return fetched, fetched.size
        # Loads all pixels, which finds truncated files.
        stored = Image.open(io.BytesIO(content))
        return turn_upright(stored), stored.size
    # Pillow raises OSError, SyntaxError, struct.error and more, depending on the format.
    except Exception as error:
        raise ValueError(f"the picture cannot be read: {type(error).__name__}: {error}") from error


def _optional(columns: dict[str, list[Any]], key: str, count: int) -> list[Any]:
    """A column of which each value, or all of it, may be missing."""
    values = columns.get(key)
    if values is None:
        return [None] * count
    if len(values) != count:
        raise ValueError(f"objects has {count} values of bbox but {len(values)} of {key}.")
    return values
