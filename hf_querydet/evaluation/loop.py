"""A detector on a dataset, from the first batch to COCO's numbers."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from hf_querydet.data import DetectionCollator, DetectionDataset, IterableDetectionDataset
from hf_querydet.evaluation.coco_evaluator import CocoEvaluator
from hf_querydet.image_processing_utils import DetectionImageProcessor
from hf_querydet.inference import predict


def evaluate_detector(
    model: nn.Module,
    processor: DetectionImageProcessor,
    batches: Iterable[Mapping[str, Any]],
    evaluator: CocoEvaluator,
    *,
    threshold: float = 0.0,
) -> dict[str, float]:
    """Run a detector over annotated pictures and compute COCO's numbers.

    Under several processes each feeds its own batches, and every process gets the same numbers. The
    model is in evaluation mode meanwhile.

    Args:
        model: A detector, wrapped by accelerate or not.
        processor: Its image processor.
        batches: As :func:`evaluation_loader` or a loader that accelerate has prepared gives them,
            on the CPU or the model's device.
        evaluator: Collects the predictions, which can be had from it afterwards. It forgets what it
            had before.
        threshold: Detections with a score above it count. COCO wants all of them.

    Returns:
        What :meth:`CocoEvaluator.compute` returns.

    Raises:
        ValueError: If the dataset behind ``batches`` has other labels than the evaluator.
    """
    check_labels(getattr(batches, "dataset", None), evaluator.id2label)
    evaluator.reset()
    if isinstance(model, DistributedDataParallel):
        # Its forward waits for the other processes, which may have fewer batches, or none.
        model = model.module
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    for batch in batches:
        if device.type != "cpu":  # weights that FSDP keeps there want their batches elsewhere
            batch = send_to_device(batch, device)
        sizes = torch.stack([labels["orig_size"] for labels in batch["labels"]])
        detections = predict(model, processor, batch, sizes, threshold=threshold)
        evaluator.update(detections, batch["labels"])
    model.train(was_training)
    return evaluator.compute()


def check_labels(dataset: Any, id2label: Mapping[int, str]) -> None:
    """Raise if a dataset of this library numbers its classes otherwise than a model.

    Args:
        dataset: What has no ``id2label`` is taken to be right.
        id2label: Of the model.
    """
    labels = getattr(dataset, "id2label", None)
    if labels is not None and labels != id2label:
        raise ValueError(
            f"The labels of the dataset are {labels}, those of the model {dict(id2label)}; use "
            "dataset.with_labels(model.config.id2label)."
        )


def evaluation_loader(
    dataset: DetectionDataset | IterableDetectionDataset,
    processor: DetectionImageProcessor,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
) -> DataLoader:
    """A loader of this process's share of a dataset, for :func:`evaluate_detector`.

    Under several processes each loads its share of the batches that one process would load. No
    picture is in two shares or in none.

    Args:
        dataset: With the labels of the model, see ``with_labels``.
        processor: Image processor of the model.
        batch_size: Pictures in a batch, per process.
        num_workers: Processes that prepare pictures, per process.

    Returns:
        A loader whose batches are those of :class:`~hf_querydet.data.DetectionCollator`.
    """
    state = PartialState()
    share = dataset.split_by_process(
        state.process_index, state.num_processes, batch_size=batch_size
    )
    return DataLoader(
        share.with_processor(processor),
        batch_size=batch_size,
        collate_fn=DetectionCollator(processor),
        num_workers=num_workers,
    )
