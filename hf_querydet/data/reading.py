"""From a row of a dataset to a picture and its annotations, checked."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
from PIL import Image

from hf_querydet.coco_annotations import prepare_labels
from hf_querydet.data.labels import LabelTable
from hf_querydet.image_reading import turn_upright, upright_size

# The second is COCO's, the third that of Hugging Face's guide to image folders.
CATEGORY_KEYS = ("category", "category_id", "categories")
BoxFormat = Literal["xywh", "xyxy"]


class BadExampleError(ValueError):
    """A row that cannot be used: its picture cannot be read or its annotations are wrong."""


@dataclass(frozen=True)
class RowReader:
    """Reads one row of a dataset in the usual columns of the Hub.

    Columns: ``image`` (undecoded: path and bytes), ``image_id`` (optional), ``objects`` with
    ``bbox`` (see ``box_format``), ``category``, ``category_id`` or
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
        box_format: Whether ``bbox`` is left, top, width, height or left, top, right, bottom.
    """

    label_table: LabelTable
    category_key: str
    has_image_ids: bool
    checks_sizes: bool = False
    box_format: BoxFormat = "xywh"

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

    def check_categories(self, row: Mapping[str, Any], row_number: int) -> None:
        """Raise if a category of one row has no label.

        Raises:
            BadExampleError: As :meth:`read` raises it, which also looks at the picture.
        """
        try:
            for category in objects_as_columns(row.get("objects")).get(self.category_key) or []:
                self.label_table.label_of(category)
        except ValueError as error:
            raise BadExampleError(f"{self.describe(row, row_number)}: {error}") from error

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
        if self.box_format == "xyxy":
            bboxes = [_corners_to_sizes(bbox) for bbox in bboxes]
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
        content = _file_content(image)
        if content is None:  # a stream's, which datasets fetches
            fetched = datasets.Image().decode_example({"path": image.get("path"), "bytes": None})
            return fetched, fetched.size
        # Loads all pixels, which finds truncated files.
        stored = Image.open(io.BytesIO(content))
        return turn_upright(stored), stored.size
    # Pillow raises OSError, SyntaxError, struct.error and more, depending on the format.
    except Exception as error:
        raise ValueError(f"the picture cannot be read: {type(error).__name__}: {error}") from error


def picture_size(image: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """(width, height) of an undecoded picture, upright, from the head of its file.

    None where it cannot be told.
    """
    try:
        return upright_size(Image.open(io.BytesIO(_file_content(image or {}))))
    except Exception:  # as many kinds as of _decode, which says so when the row is read
        return None


def _file_content(image: Mapping[str, Any]) -> bytes | None:
    """The file of an undecoded picture; None where it is neither in the row nor on this disk."""
    path, content = image.get("path"), image.get("bytes")
    if content is None and path is not None and Path(path).is_file():
        content = Path(path).read_bytes()
    return content


def _corners_to_sizes(bbox: Any) -> list[float]:
    """From left, top, right, bottom to left, top, width, height."""
    try:
        left, top, right, bottom = bbox
        width, height = right - left, bottom - top
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"bbox must hold 4 numbers, [left, top, right, bottom]; got {bbox!r}."
        ) from error
    if width < 0 or height < 0:
        raise ValueError(
            "bbox must be [left, top, right, bottom] with right not below left and bottom not "
            f"below top, got {bbox!r}; [left, top, width, height] is box_format='xywh'."
        )
    return [left, top, width, height]


def _optional(columns: dict[str, list[Any]], key: str, count: int) -> list[Any]:
    """A column of which each value, or all of it, may be missing."""
    values = columns.get(key)
    if values is None:
        return [None] * count
    if len(values) != count:
        raise ValueError(f"objects has {count} values of bbox but {len(values)} of {key}.")
    return values
