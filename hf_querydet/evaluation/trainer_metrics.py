"""COCO numbers inside transformers' Trainer."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from transformers import EvalPrediction

from hf_querydet.evaluation.coco_evaluator import CocoEvaluator
from hf_querydet.image_processing_utils import DetectionImageProcessor


class DetectionMetrics:
    """``compute_metrics`` for detection with bounded memory.

    Batches are evaluated as they come, so nothing but the detections of each picture is kept. This
    needs ``TrainingArguments(batch_eval_metrics=True, eval_do_concat_batches=False,
    remove_unused_columns=False)``.

    Args:
        processor: Image processor of the model, for its post-processing.
        id2label: ``model.config.id2label``.
        **evaluator_options: For :class:`CocoEvaluator`.
    """

    def __init__(
        self,
        processor: DetectionImageProcessor,
        id2label: Mapping[int, str],
        **evaluator_options: Any,
    ):
        self.processor = processor
        self.evaluator = CocoEvaluator(id2label, **evaluator_options)

    def __call__(
        self, batch: EvalPrediction, compute_result: bool | None = None
    ) -> dict[str, float]:
        """Add a batch; at the last one, compute.

        Args:
            batch: ``predictions`` (logits, pred_boxes), ``label_ids`` one dictionary per picture.
            compute_result: Whether this is the last batch; the Trainer says so.

        Returns:
            The result of :meth:`CocoEvaluator.compute` at the last batch, before it nothing.

        Raises:
            ValueError: If the Trainer collects batches, or the model's outputs are others.
        """
        if compute_result is None:
            raise ValueError(
                "DetectionMetrics is called batch by batch; set batch_eval_metrics=True in the "
                "TrainingArguments."
            )
        labels = batch.label_ids
        self.evaluator.update(self._predictions(batch.predictions, labels), labels)
        if not compute_result:
            return {}
        metrics = self.evaluator.compute()
        self.evaluator.reset()
        return metrics

    def _predictions(self, outputs: Any, labels: list[Mapping[str, torch.Tensor]]) -> list[dict]:
        is_pair = isinstance(outputs, (tuple, list)) and len(outputs) == 2
        if not is_pair or any(not isinstance(output, torch.Tensor) for output in outputs):
            found = [type(output).__name__ for output in outputs] if outputs is not None else None
            raise ValueError(
                f"predictions must be the pair (logits, pred_boxes), got {found}; list every other "
                "output in config.keys_to_ignore_at_inference."
            )
        logits, pred_boxes = outputs
        return self.processor.post_process_object_detection(
            SimpleNamespace(logits=logits, pred_boxes=pred_boxes),
            threshold=0.0,
            target_sizes=torch.stack([target["orig_size"] for target in labels]),
        )
