"""COCO detection annotations to training labels.

One picture's annotations are collected with one pass over the list, checked and converted as whole
arrays, and become one set of tensors. Arrays are NumPy's here: for a handful of boxes its calls
cost a fraction of torch's.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

ANNOTATION_FORM = (
    '{"image_id": int, "annotations": [{"bbox": [x, y, width, height] in pixels, '
    '"category_id": int, "area": float (optional), "iscrowd": 0 or 1 (optional)}, ...]}'
)


def match_annotations(annotations: Any, num_pictures: int) -> list[Mapping[str, Any]]:
    """Check that there is one annotation set per picture and that each has the two keys.

    Args:
        annotations: One set for one picture, or a list with one set per picture.
        num_pictures: How many pictures they belong to.

    Returns:
        One set per picture.

    Raises:
        TypeError: If a set is not a dictionary or its annotations are not a list.
        ValueError: If the counts differ or a key is missing.
    """
    sets = [annotations] if isinstance(annotations, Mapping) else annotations
    if not _is_list(sets):
        raise TypeError(
            f"annotations must be a dictionary or a list of dictionaries of the form "
            f"{ANNOTATION_FORM}, got {type(sets).__name__}."
        )
    for index, one_set in enumerate(sets):
        if not isinstance(one_set, Mapping):
            raise TypeError(
                f"annotations[{index}] must be a dictionary of the form {ANNOTATION_FORM}, "
                f"got {type(one_set).__name__}."
            )
        missing = {"image_id", "annotations"} - set(one_set)
        if missing:
            raise ValueError(
                f"annotations[{index}] lacks {sorted(missing)}, it has "
                f"{sorted(map(str, one_set))}; the form is {ANNOTATION_FORM}."
            )
        if not _is_list(one_set["annotations"]):
            raise TypeError(
                f'annotations[{index}]["annotations"] must be a list, '
                f"got {type(one_set['annotations']).__name__}."
            )
    if len(sets) != num_pictures:
        raise ValueError(
            f"There must be one annotation set per picture, got {len(sets)} for {num_pictures} "
            "pictures; a picture without objects has an empty list of annotations."
        )
    return list(sets)


def prepare_labels(
    annotation_set: Mapping[str, Any],
    *,
    original_size: tuple[int, int],
    resized_size: tuple[int, int],
    normalise_boxes: bool = True,
    device: str | torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """Turn the annotations of one picture into labels.

    Boxes are relative to the unpadded picture, so they depend neither on the other pictures of a
    batch nor on the canvas. They are clipped to the picture; those without area inside it are
    dropped.

    Args:
        annotation_set: See :data:`ANNOTATION_FORM`; other keys are ignored. Boxes are in pixels of
            the original, upright picture.
        original_size: (height, width) to which the annotations refer.
        resized_size: (height, width) of the picture as the model sees it, without padding.
        normalise_boxes: Boxes come out as cxcywh in [0, 1]; otherwise as xyxy in pixels of the
            resized picture.
        device: Where the tensors go.

    Returns:
        ``class_labels`` int64 (objects,), ``boxes`` float32 (objects, 4), ``area`` float32
        (objects,) in pixels of the resized picture, ``iscrowd`` int64 (objects,) all 0,
        ``image_id`` int64 (1,), ``orig_size`` and ``size`` int64 (2,) as (height, width). Crowd
        regions are no objects; they stand apart for evaluation: ``crowd_boxes`` (crowds, 4),
        ``crowd_class_labels`` (crowds,).

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is missing or impossible, or a box lies outside its picture.
    """
    reader = _AnnotationReader(annotation_set)
    boxes_xyxy, inside = reader.clipped_boxes(*original_size)
    class_labels = reader.class_labels()
    is_crowd = reader.is_crowd()
    area = reader.areas()

    width_and_height = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    area = np.where(np.isnan(area), width_and_height.prod(axis=1), area)
    scale_y, scale_x = (new / old for new, old in zip(resized_size, original_size, strict=True))
    if normalise_boxes:
        center = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
        boxes = np.concatenate([center, width_and_height], axis=1) / (original_size[::-1] * 2)
    else:
        boxes = boxes_xyxy * (scale_x, scale_y, scale_x, scale_y)

    is_object, is_crowd = inside & ~is_crowd, inside & is_crowd
    arrays = {
        "class_labels": class_labels[is_object],
        "boxes": boxes[is_object].astype(np.float32),
        "area": (area[is_object] * (scale_x * scale_y)).astype(np.float32),
        "iscrowd": np.zeros(is_object.sum(), dtype=np.int64),
        "image_id": np.array([reader.image_id], dtype=np.int64),
        "orig_size": np.array(original_size, dtype=np.int64),
        "size": np.array(resized_size, dtype=np.int64),
        "crowd_boxes": boxes[is_crowd].astype(np.float32),
        "crowd_class_labels": class_labels[is_crowd],
    }
    labels = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if device is not None:
        labels = {name: tensor.to(device) for name, tensor in labels.items()}
    return labels


class _AnnotationReader:
    """Reads the columns of one picture's annotations; every failure names the annotation."""

    def __init__(self, annotation_set: Mapping[str, Any]) -> None:
        self.image_id = _read_image_id(annotation_set["image_id"])
        self.annotations: Sequence[Mapping[str, Any]] = annotation_set["annotations"]
        for index, annotation in enumerate(self.annotations):
            if not isinstance(annotation, Mapping):
                raise TypeError(
                    f"image_id {self.image_id}, annotations[{index}] must be a dictionary, got "
                    f"{type(annotation).__name__}; the form is {ANNOTATION_FORM}."
                )
            for key in ("bbox", "category_id"):
                if key not in annotation:
                    raise ValueError(
                        f"image_id {self.image_id}, annotations[{index}] lacks {key!r}, it has "
                        f"{sorted(map(str, annotation))}; the form is {ANNOTATION_FORM}."
                    )

    def clipped_boxes(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes as xyxy clipped to the picture (n, 4), and which of them have area there (n,)."""
        boxes_xywh = self._box_column()
        self._refuse(~np.isfinite(boxes_xywh).all(axis=1), "bbox", "must hold finite numbers")
        self._refuse(
            (boxes_xywh[:, 2:] < 0).any(axis=1),
            "bbox",
            "must be [x, y, width, height] with width and height at least 0; corners [left, top, "
            "right, bottom] become [left, top, right - left, bottom - top]",
        )
        boxes_xyxy = np.concatenate(
            [boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1
        )
        clipped = boxes_xyxy.clip(0, (width, height, width, height))
        has_area = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(axis=1)
        inside = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
        self._refuse(
            has_area & ~inside,
            "bbox",
            f"must overlap its picture of height {height} and width {width}; boxes are [x, y, "
            "width, height] in pixels of the original, upright picture",
        )
        return clipped, inside

    def class_labels(self) -> np.ndarray:
        """Category ids, int64 (n,)."""
        need = "must be an integer of at least 0"
        values = self._number_column("category_id", kinds="iu", need=need, default=None)
        self._refuse(values < 0, "category_id", f"{need}; map the categories to 0, 1, ...")
        return values.astype(np.int64)

    def is_crowd(self) -> np.ndarray:
        """Which annotations are crowd regions, bool (n,)."""
        values = self._number_column("iscrowd", kinds="iub", need="must be 0 or 1", default=0)
        self._refuse((values != 0) & (values != 1), "iscrowd", "must be 0 or 1")
        return values.astype(bool)

    def areas(self) -> np.ndarray:
        """Areas in original pixels, float64 (n,); NaN where none is given."""
        need = "must be a finite number of at least 0, or left out"
        values = self._number_column("area", kinds="iuf", need=need, default=np.nan)
        given = np.array([item.get("area") is not None for item in self.annotations], dtype=bool)
        self._refuse(given & ~((values >= 0) & np.isfinite(values)), "area", need)
        return values.astype(np.float64)

    def _box_column(self) -> np.ndarray:
        values = [annotation["bbox"] for annotation in self.annotations]
        if not values:
            return np.zeros((0, 4))
        boxes = _as_array(values)
        if boxes is None or boxes.shape != (len(values), 4) or boxes.dtype.kind not in "iuf":
            for index, value in enumerate(values):
                box = _as_array(value)
                if box is None or box.ndim != 1 or box.dtype.kind not in "iuf":
                    self._fail(index, "bbox", "must be a list of 4 numbers", TypeError)
                if len(box) != 4:
                    self._fail(index, "bbox", "must hold 4 numbers: [x, y, width, height]")
        return boxes.astype(np.float64)

    def _number_column(self, key: str, *, kinds: str, need: str, default: Any) -> np.ndarray:
        """One number per annotation, of a type whose NumPy letter is among ``kinds``."""
        values = [annotation.get(key) for annotation in self.annotations]
        values = [default if value is None else value for value in values]
        if not values:
            return np.zeros(0, dtype=np.int64)
        column = _as_array(values)
        if column is None or column.ndim != 1 or column.dtype.kind not in kinds:
            for index, value in enumerate(values):
                number = _as_array(value)
                if number is None or number.ndim != 0 or number.dtype.kind not in kinds:
                    self._fail(index, key, need, TypeError)
        return column

    def _refuse(self, wrong: np.ndarray, key: str, need: str) -> None:
        if wrong.any():
            self._fail(int(wrong.argmax()), key, need)

    def _fail(
        self, index: int, key: str, need: str, error: type[Exception] = ValueError
    ) -> NoReturn:
        annotation = self.annotations[index]
        name = f" (id {annotation['id']})" if "id" in annotation else ""
        raise error(
            f"image_id {self.image_id}, annotations[{index}]{name}: {key} {need}; "
            f"got {annotation.get(key)!r}."
        )


def _read_image_id(image_id: Any) -> int:
    try:
        return operator.index(image_id)
    except TypeError:
        raise TypeError(
            f"image_id must be an integer, got {image_id!r}; number the pictures and keep a table "
            "of their names."
        ) from None


def _as_array(values: Any) -> np.ndarray | None:
    """The values as an array, or None where they have no common shape."""
    try:
        return np.asarray(values)
    except (ValueError, TypeError):
        return None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
