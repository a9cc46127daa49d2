"""COCO average precision and recall, over any number of processes and with bounded memory."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from hf_querydet.configuration_utils import UNUSED_LABEL
from hf_querydet.file_writing import JsonArrayWriter, partial_file
from hf_querydet.ops.boxes import BOX_TOLERANCE, boxes_cxcywh_to_xyxy

UNDEFINED = -1.0
METRIC_NAMES = (
    "map",
    "map_50",
    "map_75",
    "map_small",
    "map_medium",
    "map_large",
    "mar_1",
    "mar_10",
    "mar_100",
    "mar_small",
    "mar_medium",
    "mar_large",
)


@dataclass(frozen=True)
class _Picture:
    """What is kept of one picture: a few kilobytes of NumPy arrays.

    Attributes:
        size: (height, width) in pixels.
        scores: (detections,) float32, descending.
        labels: (detections,) int32.
        boxes_xyxy: (detections, 4) float32, pixels.
        target_labels: (targets,) int32; objects, then crowd regions.
        target_boxes_xywh: (targets, 4) float64, pixels.
        target_areas: (targets,) float64, square pixels.
        target_is_crowd: (targets,) bool.
    """

    size: tuple[int, int]
    scores: np.ndarray
    labels: np.ndarray
    boxes_xyxy: np.ndarray
    target_labels: np.ndarray
    target_boxes_xywh: np.ndarray
    target_areas: np.ndarray
    target_is_crowd: np.ndarray

    def has_targets_of(self, other: "_Picture") -> bool:
        return self.size == other.size and np.array_equal(
            self.target_boxes_xywh, other.target_boxes_xywh
        )


class CocoEvaluator:
    """Collects predictions picture by picture and computes COCO's numbers at the end.

    Under several processes each one feeds it its own pictures; :meth:`compute` merges them and
    gives every process the same result. A picture that is given twice counts once, with what was
    found last; of a picture that several processes had, one result counts.

    Args:
        id2label: ``model.config.id2label``. Labels named "N/A" are no classes and are left out.
        label_to_category: From label to the dataset's own category id, for :meth:`coco_results`;
            not given: the label itself.
        own_image_id: Called with the ``image_id`` of labels, returns the dataset's own id of that
            picture, for :meth:`coco_results`; not given: the same.
        max_detections: Detections kept per picture, best first. COCO's rule is 100.
    """

    def __init__(
        self,
        id2label: Mapping[int, str],
        *,
        label_to_category: Mapping[int, int | str] | None = None,
        own_image_id: Callable[[int], int | str] | None = None,
        max_detections: int = 100,
    ):
        if max_detections < 1:
            raise ValueError(f"max_detections must be at least 1, got {max_detections}.")
        self.id2label = {int(label): name for label, name in id2label.items()}
        self.label_to_category = label_to_category
        self.own_image_id = own_image_id
        self.max_detections = max_detections
        self._pictures: dict[int, _Picture] = {}

    def __len__(self) -> int:
        """Number of pictures that this process has collected."""
        return len(self._pictures)

    def reset(self) -> None:
        """Forget all pictures."""
        self._pictures = {}

    def update(
        self, predictions: Sequence[Mapping[str, Tensor]], labels: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Add the pictures of a batch.

        Args:
            predictions: Per picture ``scores`` (n,), ``labels`` (n,) and ``boxes`` (n, 4), xyxy in
                pixels of the original picture: what ``post_process_object_detection`` returns with
                ``threshold=0.0`` and ``target_sizes``.
            labels: Per picture the labels as the image processor returns them. Ground truth is
                taken from them: boxes relative to the picture, areas in pixels of ``size``.

        Raises:
            ValueError: If the lists differ in length, a label is not in ``id2label``, boxes of
                labels are not relative, or two different pictures have one image id.
        """
        if len(predictions) != len(labels):
            raise ValueError(
                "predictions and labels must have one entry per picture, got "
                f"{len(predictions)} and {len(labels)}."
            )
        for prediction, target in zip(predictions, labels, strict=True):
            image_id, picture = int(target["image_id"]), self._picture(prediction, target)
            self._check_targets(image_id, picture)
            self._pictures[image_id] = picture

    def compute(self) -> dict[str, float]:
        """COCO's numbers over the pictures of all processes.

        Every process must call this; each gets the result.

        Returns:
            The twelve of :data:`METRIC_NAMES`, then for each class ``map/NAME`` and
            ``map_50/NAME``, all in [0, 1]; -1 where there is no ground truth.
        """
        self._merge_processes()
        classes = [label for label, name in self.id2label.items() if name != UNUSED_LABEL]
        evaluation = self._evaluate(classes) if self._pictures and classes else None
        return self._metrics(evaluation, classes)

    def detections(self, image_id: int) -> dict[str, Tensor]:
        """What was kept of one picture, in the form of ``post_process_object_detection``.

        Args:
            image_id: Of a picture that was collected, here or, after :meth:`compute`, elsewhere.

        Returns:
            ``scores`` (n,), descending, ``labels`` (n,) and ``boxes`` (n, 4), xyxy in pixels.

        Raises:
            KeyError: If no picture has this id.
        """
        if image_id not in self._pictures:
            raise KeyError(f"no picture with image_id {image_id} was collected.")
        picture = self._pictures[image_id]
        return {
            "scores": torch.from_numpy(picture.scores),
            "labels": torch.from_numpy(picture.labels),
            "boxes": torch.from_numpy(picture.boxes_xyxy),
        }

    def coco_results(self) -> list[dict[str, Any]]:
        """Detections as the rows of a COCO result file.

        Call :meth:`compute` first where several processes collect. Labels without a category of
        the dataset have no row.

        Returns:
            One ``{"image_id", "category_id", "bbox", "score"}`` per detection, ``bbox`` as left,
            top, width, height in pixels, in the order of image ids.
        """
        return list(self._rows())

    def write_coco_results(self, path: str | os.PathLike) -> None:
        """Write the rows of :meth:`coco_results` as a COCO result file, one by one."""
        with partial_file(path) as file:
            rows = JsonArrayWriter(file)
            for row in self._rows():
                rows.add(row)
            rows.close()

    def _rows(self) -> Iterator[dict[str, Any]]:
        categories = self.label_to_category
        if categories is None:
            categories = {
                label: label for label, name in self.id2label.items() if name != UNUSED_LABEL
            }
        for image_id, picture in sorted(self._pictures.items()):
            own_id = image_id if self.own_image_id is None else self.own_image_id(image_id)
            for label, bbox, score in _detections(picture):
                if label in categories:
                    yield {
                        "image_id": own_id,
                        "category_id": categories[label],
                        "bbox": bbox,
                        "score": score,
                    }

    def _picture(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> _Picture:
        prediction, target = _to_host(prediction), _to_host(target)
        # Stable, so that equal scores keep the order in which the model gave them.
        scores, order = prediction["scores"].float().sort(descending=True, stable=True)
        order = order[: self.max_detections]
        height, width = target["orig_size"].tolist()
        target_labels = _joined(target, "class_labels", "crowd_class_labels").astype(np.int32)
        boxes = _joined(target, "boxes", "crowd_boxes")
        if not ((boxes >= -BOX_TOLERANCE) & (boxes <= 1 + BOX_TOLERANCE)).all():
            raise ValueError(
                f"labels of image {int(target['image_id'])} have boxes that are not (centre x, "
                f"centre y, width, height) relative to the picture, between 0 and 1: {boxes[:3]}; "
                "take labels as the image processor makes them from annotations."
            )
        boxes_xywh = _to_pixels_xywh(boxes, height, width)
        num_objects = len(target["class_labels"])
        picture = _Picture(
            size=(height, width),
            scores=_compact(scores[: self.max_detections], torch.float32),
            labels=_compact(prediction["labels"][order], torch.int32),
            boxes_xyxy=_compact(prediction["boxes"][order], torch.float32),
            target_labels=target_labels,
            target_boxes_xywh=boxes_xywh,
            target_areas=_original_areas(target, boxes_xywh),
            target_is_crowd=np.arange(len(target_labels)) >= num_objects,
        )
        picture.target_is_crowd[:num_objects] = _compact(target["iscrowd"], torch.bool)
        for name, found in (("predictions", picture.labels), ("labels", target_labels)):
            unknown = sorted(set(found.tolist()) - set(self.id2label))
            if unknown:
                raise ValueError(
                    f"{name} of image {int(target['image_id'])} have the labels {unknown}, which "
                    f"id2label lacks; it has {len(self.id2label)} labels."
                )
        return picture

    def _check_targets(self, image_id: int, picture: _Picture) -> None:
        known = self._pictures.get(image_id, picture)
        if not known.has_targets_of(picture):
            raise ValueError(
                f"image_id {image_id} belongs to two pictures with different ground truth; image "
                "ids must be unique."
            )

    def _merge_processes(self) -> None:
        # On one process the list comes back as it is.
        for image_id, picture in gather_object(list(self._pictures.items())):
            self._check_targets(image_id, picture)
            self._pictures.setdefault(image_id, picture)

    def _evaluate(self, classes: list[int]) -> COCOeval_faster:
        images = [
            {"id": image_id, "height": picture.size[0], "width": picture.size[1]}
            for image_id, picture in sorted(self._pictures.items())
        ]
        categories = [{"id": label, "name": self.id2label[label]} for label in classes]
        known = set(classes)
        targets, detections = [], []
        for image_id, picture in sorted(self._pictures.items()):
            for label, bbox, area, is_crowd in _targets(picture):
                if label in known:
                    # Numbered from 1: a match to annotation 0 would count as no match.
                    targets.append(
                        {
                            "id": len(targets) + 1,
                            "image_id": image_id,
                            "category_id": label,
                            "bbox": bbox,
                            "area": area,
                            "iscrowd": int(is_crowd),
                        }
                    )
            for label, bbox, score in _detections(picture):
                if label in known:
                    detections.append(
                        {
                            "id": len(detections) + 1,
                            "image_id": image_id,
                            "category_id": label,
                            "bbox": bbox,
                            "area": bbox[2] * bbox[3],
                            "score": score,
                            "iscrowd": 0,
                        }
                    )
        common = {"images": images, "categories": categories}
        evaluation = COCOeval_faster(
            COCO({**common, "annotations": targets}),
            COCO({**common, "annotations": detections}),
            iouType="bbox",
            print_function=_silent,
        )
        evaluation.run()
        return evaluation

    def _metrics(self, evaluation: COCOeval_faster | None, classes: list[int]) -> dict[str, float]:
        if evaluation is None:
            metrics = dict.fromkeys(METRIC_NAMES, UNDEFINED)
        else:
            stats = evaluation.stats[: len(METRIC_NAMES)]
            metrics = dict(zip(METRIC_NAMES, (float(value) for value in stats), strict=True))
        for index, label in enumerate(sorted(classes)):
            name = self.id2label[label]
            precision = np.full((1, 1), UNDEFINED)
            if evaluation is not None:
                # (thresholds, recalls, classes, areas, detections): all areas, most detections.
                precision = evaluation.eval["precision"][:, :, index, 0, -1]
            metrics[f"map/{name}"] = _mean_of_defined(precision)
            metrics[f"map_50/{name}"] = _mean_of_defined(precision[0])
        return metrics


def _to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _targets(picture: _Picture) -> zip:
    return zip(
        picture.target_labels.tolist(),
        picture.target_boxes_xywh.tolist(),
        picture.target_areas.tolist(),
        picture.target_is_crowd.tolist(),
        strict=True,
    )


def _detections(picture: _Picture) -> zip:
    boxes_xywh = picture.boxes_xyxy.astype(np.float64)
    boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
    return zip(picture.labels.tolist(), boxes_xywh.tolist(), picture.scores.tolist(), strict=True)


def _joined(target: Mapping[str, Tensor], key: str, crowd_key: str) -> np.ndarray:
    """Values of the objects, then of the crowd regions, if the labels hold any."""
    values = target[key]
    if crowd_key in target:
        values = torch.cat([values, target[crowd_key]])
    return values.numpy()


def _to_pixels_xywh(boxes_cxcywh: np.ndarray, height: int, width: int) -> np.ndarray:
    boxes_xyxy = boxes_cxcywh_to_xyxy(torch.from_numpy(boxes_cxcywh.astype(np.float64))).numpy()
    boxes_xyxy = boxes_xyxy * np.array([width, height, width, height])
    boxes_xywh = np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], axis=1)
    # Normalised float32 boxes are off by some 1e-4 pixels. Rounding brings the annotation's own
    # decimals back, without which an IoU of exactly one half could fall on either side.
    return boxes_xywh.round(3)


def _original_areas(target: Mapping[str, Tensor], boxes_xywh: np.ndarray) -> np.ndarray:
    """Areas in pixels of the original picture, of objects and crowd regions."""
    height, width = target["orig_size"].tolist()
    resized_height, resized_width = target["size"].tolist()
    scale = (height * width) / (resized_height * resized_width)
    areas = boxes_xywh[:, 2] * boxes_xywh[:, 3]
    given = target["area"].numpy().astype(np.float64)
    areas[: len(given)] = given * scale
    # As above: an area of exactly 32 * 32 pixels must stay on the border that COCO draws there.
    return areas.round(2)


def _compact(values: Tensor, dtype: torch.dtype) -> np.ndarray:
    """A copy that holds nothing else alive."""
    return values.to(dtype, copy=True).numpy()


def _mean_of_defined(precision: np.ndarray) -> float:
    defined = precision[precision > UNDEFINED]
    return float(defined.mean()) if defined.size else UNDEFINED


def _silent(*_: Any) -> None:
    """The evaluator's progress lines are of no use in a training log."""
