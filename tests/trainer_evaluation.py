"""Evaluating a detector by hand and with a Trainer."""

import torch
from transformers import TrainingArguments

from hf_querydet.data import DetectionCollator
from hf_querydet.evaluation import CocoEvaluator, DetectionTrainer

SIZES = [(61, 43), (38, 57), (75, 31), (52, 49)]


@torch.no_grad()
def detect(detector, processor, items):
    batch = DetectionCollator(processor)(items)
    outputs = detector(batch["pixel_values"], batch["pixel_mask"])
    sizes = torch.stack([labels["orig_size"] for labels in batch["labels"]])
    return processor.post_process_object_detection(outputs, 0.0, sizes)


def by_hand(detector, processor, dataset):
    evaluator = CocoEvaluator(detector.config.id2label)
    for item in dataset:
        evaluator.update(detect(detector, processor, [item]), [item["labels"]])
    return evaluator.compute()


def make_trainer(
    folder, detector, processor, dataset, trainer=DetectionTrainer, arguments=None, **options
):
    training_arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_eval_batch_size=3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **(arguments or {}),
    )
    settings = {
        "model": detector,
        "args": training_arguments,
        "eval_dataset": dataset,
        "data_collator": DetectionCollator(processor),
        "processing_class": processor,
        **options,
    }
    return trainer(**settings)
