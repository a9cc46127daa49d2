"""transformers' Trainer with COCO numbers."""

import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from hf_querydet.evaluation.coco_evaluator import CocoEvaluator
from hf_querydet.evaluation.loop import check_labels

logger = logging.getLogger(__name__)


class TrainingProgressCallback(TrainerCallback):
    """Tells the model before each optimizer step how much of the run is done.

    See :meth:`~hf_querydet.modeling_utils.DetectorPreTrainedModel.set_training_progress`. Models of
    other libraries, which have no such method, are left alone.
    """

    def on_step_begin(
        self, args: Any, state: TrainerState, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """Pass on the share of steps that are done, those before a resumed checkpoint included."""
        detector = extract_model_from_parallel(model)
        if hasattr(detector, "set_training_progress"):
            detector.set_training_progress(state.global_step / state.max_steps)


class DetectionTrainer(Trainer):
    """Trainer whose evaluation gives COCO's numbers, with bounded memory, in several processes too.

    ``evaluate`` adds what :meth:`CocoEvaluator.compute` returns, each key with the prefix
    ``eval_``, so that ``metric_for_best_model="map"`` works. ``processing_class`` must be the image
    processor; no ``compute_metrics`` is needed.

    Why not ``compute_metrics``: between a batch and that function, the Trainer gathers the labels
    over processes as if each tensor had one row per picture. A list of dictionaries does not: in an
    incomplete last batch every tensor of every dictionary is cut to as many rows as there are
    pictures, which loses boxes without a word, and unequal numbers of boxes cannot be gathered.
    Here each process evaluates its own pictures, and only detections travel. A Trainer of your own
    can use :class:`~hf_querydet.evaluation.DetectionMetrics`, which brings the labels into the one
    form that survives.

    ``predict`` returns metrics and no predictions.

    Training goes as with ``Trainer``; a model that has a schedule of its own is told how much of
    the run is done, see :class:`TrainingProgressCallback`. In a process that sees several GPUs it
    uses the first one: ``Trainer`` would cut the labels of each picture into pieces for them
    (``torch.nn.DataParallel``). For all of them start a process per GPU with ``accelerate launch``.

    Raises:
        ValueError: If ``compute_metrics`` or ``preprocess_logits_for_metrics`` is given.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("compute_metrics", "preprocess_logits_for_metrics"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"DetectionTrainer computes COCO's numbers itself and would never call {name}; "
                    "leave it out, or use transformers' Trainer with DetectionMetrics."
                )
        if self.args.n_gpu > 1:
            logger.warning(
                "%d GPUs are visible and the first one is used; `accelerate launch --multi_gpu` "
                "or torchrun starts a process for each.",
                self.args.n_gpu,
            )
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size
        self.add_callback(TrainingProgressCallback)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the model over a dataset; COCO's numbers are among the metrics, the loss as well."""
        if not hasattr(self.processing_class, "post_process_object_detection"):
            raise ValueError(
                "processing_class must be the image processor of the model, got "
                f"{type(self.processing_class).__name__}."
            )
        id2label = self.accelerator.unwrap_model(self.model).config.id2label
        check_labels(dataloader.dataset, id2label)
        self._evaluator = CocoEvaluator(id2label)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        metrics = self._evaluator.compute()
        output.metrics.update({f"{metric_key_prefix}_{key}": metrics[key] for key in metrics})
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, None, None]:
        """Run the model on a batch and keep its detections; only the loss is handed on."""
        # With bf16_full_eval or fp16_full_eval the model has another type than the pictures.
        dtype = next(model.parameters()).dtype
        inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
        loss, outputs, labels = super().prediction_step(model, inputs, False, ignore_keys)
        if labels is None:
            raise ValueError(
                "A batch has no labels, so there is nothing to compare detections with; use "
                "DetectionCollator with a dataset of annotated pictures."
            )
        predictions = self.processing_class.post_process_object_detection(
            named_outputs(outputs),
            threshold=0.0,
            target_sizes=torch.stack([target["orig_size"] for target in labels]),
        )
        self._evaluator.update(predictions, labels)
        return loss, None, None


def named_outputs(outputs: Any) -> SimpleNamespace:
    """Outputs as the Trainer hands them over, without names: first logits, then boxes."""
    is_sequence = isinstance(outputs, (tuple, list))
    if (
        not is_sequence
        or len(outputs) != 2
        or not all(isinstance(each, Tensor) for each in outputs)
    ):
        found = [type(each).__name__ for each in outputs] if is_sequence else type(outputs).__name__
        raise ValueError(
            f"In evaluation the model must return the loss, logits and pred_boxes, got {found}; "
            "list every other output in config.keys_to_ignore_at_inference."
        )
    logits, pred_boxes = outputs
    return SimpleNamespace(logits=logits, pred_boxes=pred_boxes)
