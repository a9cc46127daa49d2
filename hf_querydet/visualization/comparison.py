"""Detections beside the objects that are there: matches, misses and false alarms."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hf_querydet.coco_annotations import match_annotations, prepare_labels
from hf_querydet.ops.boxes import box_area, box_iou
from hf_querydet.visualization.drawing import (
    LabelledBox,
    draw_boxes,
    read_detections,
    rgb_picture,
)

# Told apart by colour-blind readers too; misses are dashed besides.
MATCH, MISS, FALSE_ALARM = "#56d4f5", "#ffc83d", "#ff6a3d"
OBJECT = "#ffffff"


@dataclass(frozen=True)
class Comparison:
    """Which detection found which object.

    Attributes:
        matches: Pairs (detection, object), indices into what was compared, and their IoU.
        misses: Objects that no detection found.
        false_alarms: Detections that found no object.
        ignored: Detections inside a crowd region, which count neither way.
    """

    matches: list[tuple[int, int, float]]
    misses: list[int]
    false_alarms: list[int]
    ignored: list[int]


def draw_comparison(
    image: Any,
    detections: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    annotations: Mapping[str, Any],
    *,
    id2label: Mapping[int, str] | None = None,
    iou_threshold: float = 0.5,
    scale: int | None = None,
    font: str | os.PathLike | None = None,
) -> Image.Image:
    """Draw detections and the objects that are there, and mark matches, misses and false alarms.

    Blue: a detection and the object that it matches (white, dashed). Yellow, dashed: an object that
    was missed. Orange: a false alarm. From the surest detection down, each takes the object of its
    label with which its IoU is highest, of those that are left and reach the threshold. Crowd
    regions are not drawn; detections that lie in one for the most part are left out.

    Args:
        image: Anything that an image processor reads.
        detections: In both forms of :func:`~hf_querydet.visualization.draw_detections`. All count,
            so apply your score threshold before.
        annotations: The picture's objects as the image processor takes them, ``{"image_id",
            "annotations": [{"bbox", "category_id", ...}]}``, with the label numbers of the model.
        id2label: Names of label numbers; needed where detections carry names.
        iou_threshold: Least IoU of a match.
        scale: See :func:`~hf_querydet.visualization.draw_detections`.
        font: As above.

    Raises:
        TypeError: If the annotations have another form.
        ValueError: If a part cannot be read, or iou_threshold is not between 0 and 1.
    """
    names = dict(id2label or {})
    picture = rgb_picture(image)
    found = sorted(read_detections(detections, names), key=lambda each: each[0], reverse=True)
    objects = read_objects(annotations, picture, names)
    comparison = compare(found, objects, iou_threshold=iou_threshold)

    def detection(index: int, color: str, prefix: str = "") -> LabelledBox:
        score, name, corners = found[index]
        return LabelledBox(corners, f"{prefix}{name} {score:.2f}", color)

    def corners(index: int) -> tuple[float, ...]:
        return tuple(objects.boxes[index].tolist())

    boxes = [detection(i, MATCH) for i, *_ in comparison.matches]
    boxes += [LabelledBox(corners(i), "", OBJECT, dashed=True) for _, i, _ in comparison.matches]
    boxes += [detection(i, FALSE_ALARM, "false: ") for i in comparison.false_alarms]
    boxes += [
        LabelledBox(corners(i), f"missed: {objects.names[i]}", MISS, dashed=True)
        for i in comparison.misses
    ]
    return draw_boxes(picture, boxes, scale=scale, font=font)


@dataclass(frozen=True)
class Objects:
    """What is in a picture.

    Attributes:
        boxes: (objects, 4), xyxy in pixels.
        names: Of their labels.
        crowd_boxes: Regions of many objects, (crowds, 4).
        crowd_names: Of their labels.
    """

    boxes: Tensor
    names: list[str]
    crowd_boxes: Tensor
    crowd_names: list[str]


def read_objects(
    annotations: Mapping[str, Any], picture: Image.Image, id2label: Mapping[int, str]
) -> Objects:
    """Objects from annotations, clipped to the picture as for training."""
    size = (picture.height, picture.width)
    (annotation_set,) = match_annotations(annotations, 1)
    labels = prepare_labels(
        annotation_set, original_size=size, resized_size=size, normalise_boxes=False
    )

    def names(labels: Tensor) -> list[str]:
        return [id2label.get(label, f"label {label}") for label in labels.tolist()]

    return Objects(
        boxes=labels["boxes"],
        names=names(labels["class_labels"]),
        crowd_boxes=labels["crowd_boxes"],
        crowd_names=names(labels["crowd_class_labels"]),
    )


def compare(
    found: Sequence[tuple[float, str, tuple[float, ...]]],
    objects: Objects,
    *,
    iou_threshold: float,
) -> Comparison:
    """Match detections to objects, greedily; see :func:`draw_comparison`.

    Args:
        found: Score, label and xyxy corners of detections, the surest first.
        objects: What is there.
        iou_threshold: Least IoU of a match.
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be above 0 and at most 1, got {iou_threshold}.")
    boxes = torch.tensor([corners for *_, corners in found]).reshape(-1, 1, 4)
    overlaps = box_iou(boxes, objects.boxes)
    in_crowds = _share_inside(boxes, objects.crowd_boxes)
    comparison = Comparison([], list(range(len(objects.names))), [], [])
    for index, (_, name, _) in enumerate(found):
        left = [i for i in comparison.misses if objects.names[i] == name]
        best = max(left, key=lambda i: overlaps[index, i].item(), default=None)
        if best is not None and overlaps[index, best] >= iou_threshold:
            comparison.matches.append((index, best, overlaps[index, best].item()))
            comparison.misses.remove(best)
        elif any(
            share >= iou_threshold and crowd == name
            for share, crowd in zip(in_crowds[index], objects.crowd_names, strict=True)
        ):
            comparison.ignored.append(index)
        else:
            comparison.false_alarms.append(index)
    return comparison


def _share_inside(boxes: Tensor, regions: Tensor) -> Tensor:
    """Share of each box (n, 1, 4) that lies in each region (m, 4), (n, m); as COCO's crowd IoU."""
    common = torch.cat(
        [
            torch.maximum(boxes[..., :2], regions[:, :2]),
            torch.minimum(boxes[..., 2:], regions[:, 2:]),
        ],
        dim=-1,
    )
    return box_area(common) / box_area(boxes).clamp(min=1e-9)
