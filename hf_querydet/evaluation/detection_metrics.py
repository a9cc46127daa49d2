"""COCO numbers through ``compute_metrics``, for Trainers that are not :class:`DetectionTrainer`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction

from hf_querydet.evaluation.coco_evaluator import CocoEvaluator
from hf_querydet.evaluation.detection_trainer import named_outputs
from hf_querydet.image_processing_utils import DetectionImageProcessor

FLAT_LABELS = "flat_labels"
# What the Trainer itself fills up with, when processes have unlike numbers of objects.
FILLING = -100.0


class FlatLabelsCollator:
    """Adds the labels of a batch as one tensor, the only form that a Trainer gathers correctly.

    Args:
        collator: Makes the batch, :class:`~hf_querydet.data.DetectionCollator` for instance.
    """

    def __init__(self, collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch, with ``flat_labels``, see :func:`flatten_labels`, if it has labels."""
        batch = self.collator(items)
        if "labels" in batch:
            batch[FLAT_LABELS] = flatten_labels(batch["labels"])
        return batch


class DetectionMetrics:
    """``compute_metrics`` that gives COCO's numbers, with bounded memory, in several processes too.

    The Trainer must be told where the labels are, and to keep no predictions::

        TrainingArguments(..., label_names=["flat_labels"], batch_eval_metrics=True)
        Trainer(..., data_collator=FlatLabelsCollator(DetectionCollator(processor)),
                compute_metrics=DetectionMetrics(processor, model.config.id2label))

    :class:`DetectionTrainer` needs none of this, and sends less between processes.

    Args:
        processor: Image processor of the model, for its post-processing.
        id2label: ``model.config.id2label``.
    """

    def __init__(self, processor: DetectionImageProcessor, id2label: Mapping[int, str]):
        self.processor = processor
        self.evaluator = CocoEvaluator(id2label)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch.

        Args:
            prediction: Logits and boxes, and ``flat_labels``.
            compute_result: Whether it is the last batch.

        Returns:
            What :meth:`CocoEvaluator.compute` returns after the last batch; before, nothing.

        Raises:
            ValueError: If the labels are not ``flat_labels``, or there are other outputs.
        """
        if not hasattr(prediction.label_ids, "shape"):
            raise ValueError(
                f"compute_metrics needs flat_labels, got {type(prediction.label_ids).__name__}; "
                "pass TrainingArguments(label_names=['flat_labels']) and "
                "FlatLabelsCollator(DetectionCollator(processor)) to the Trainer."
            )
        labels = unflatten_labels(torch.as_tensor(prediction.label_ids))
        # Arrays, unless batch_eval_metrics is set; then tensors of the device.
        outputs = named_outputs(
            tuple(torch.as_tensor(each).cpu() for each in prediction.predictions)
        )
        sizes = torch.stack([target["orig_size"] for target in labels])
        found = self.processor.post_process_object_detection(outputs, 0.0, sizes)
        self.evaluator.update(found, labels)
        if not compute_result:
            return {}
        metrics = self.evaluator.compute()
        self.evaluator.reset()
        return metrics


def flatten_labels(labels: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Labels as the image processor returns them, in one tensor of numbers.

    Returns:
        (batch, 1 + objects, 7) float64. The first row of a picture is image id, height and width
        of the original, height and width after resizing, number of objects and of crowd regions;
        then a row for each: class, cxcywh box, area, whether it is a crowd. Filled up with -100.
    """
    pictures = []
    for label in labels:
        crowd_labels = label.get("crowd_class_labels", label["class_labels"][:0])
        crowd_boxes = label.get("crowd_boxes", label["boxes"][:0])
        header = [
            label["image_id"].reshape(1),
            label["orig_size"],
            label["size"],
            torch.tensor([len(label["class_labels"]), len(crowd_labels)]),
        ]
        columns = [
            torch.cat([label["class_labels"], crowd_labels])[:, None],
            torch.cat([label["boxes"], crowd_boxes]),
            torch.cat([label["area"], torch.zeros(len(crowd_labels))])[:, None],
            torch.cat([label["iscrowd"], torch.ones(len(crowd_labels))])[:, None],
        ]
        rows = torch.cat([column.double() for column in columns], dim=1)
        pictures.append(torch.cat([torch.cat(header).double()[None], rows]))
    return pad_sequence(pictures, batch_first=True, padding_value=FILLING)


def unflatten_labels(flat_labels: Tensor) -> list[dict[str, Tensor]]:
    """Labels from :func:`flatten_labels`, on the host."""
    labels = []
    for rows in flat_labels.cpu():
        numbers, table = rows[0].long(), rows[1:]
        num_objects, num_crowds = numbers[5:].tolist()
        objects, crowds = table[:num_objects], table[num_objects : num_objects + num_crowds]
        labels.append(
            {
                "image_id": numbers[:1],
                "orig_size": numbers[1:3],
                "size": numbers[3:5],
                "class_labels": objects[:, 0].long(),
                "boxes": objects[:, 1:5].float(),
                "area": objects[:, 5].float(),
                "iscrowd": objects[:, 6].long(),
                "crowd_class_labels": crowds[:, 0].long(),
                "crowd_boxes": crowds[:, 1:5].float(),
            }
        )
    return labels
