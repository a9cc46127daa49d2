"""Image processor, and matching with loss, beside those of transformers.

    python benchmarks/processor_and_loss.py [--rounds 7] [--output FILE.json]

The processors turn eight photographs of 640x480 pixels (smooth noise, PIL pictures) with ten
annotated objects each into a batch at 800 pixels. The losses, of DETR (softmax) and Deformable DETR
(focal), take random predictions of six layers, 300 queries and 91 classes for eight pictures with
ten objects each, forward and backward. Results are compared before anything is timed; the libraries
take turns within each round, and a ratio is the median over rounds.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from measuring import alternate, describe_machine, median_ratio, photographs
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from hf_querydet import DETRImageProcessor
from hf_querydet.losses import FocalClassification, SetCriterion, SoftmaxClassification
from hf_querydet.outputs import SetPredictions

BATCH_SIZE = 8
OBJECTS_PER_PICTURE = 10
WIDTH, HEIGHT = 640, 480
NUM_LAYERS, NUM_QUERIES, NUM_LABELS = 6, 300, 91
COSTS = {"class_cost": 2, "bbox_cost": 5, "giou_cost": 2}
# One grey level after normalising; the libraries round at different places.
PIXEL_TOLERANCE = 0.02
LOSS_TOLERANCE = 1e-4


def annotation_sets() -> list[dict[str, Any]]:
    generator = np.random.default_rng(1)
    sets = []
    for image_id in range(BATCH_SIZE):
        annotations = [
            {
                "bbox": [x, y, width, height],
                "category_id": int(generator.integers(NUM_LABELS)),
                "area": width * height,
                "iscrowd": 0,
            }
            for x, y, width, height in generator.uniform(20, 200, (OBJECTS_PER_PICTURE, 4)).tolist()
        ]
        sets.append({"image_id": image_id, "annotations": annotations})
    return sets


def processor_runs() -> dict[str, Callable[[], Any]]:
    pictures, annotations = photographs(BATCH_SIZE, HEIGHT, WIDTH), annotation_sets()
    processors = {
        "hf_querydet": DETRImageProcessor(),
        "transformers": transformers.DetrImageProcessor(),
    }
    runs = {
        name: lambda processor=processor: processor(
            pictures, annotations=annotations, return_tensors="pt"
        )
        for name, processor in processors.items()
    }
    ours, theirs = (run() for run in runs.values())
    difference = (ours["pixel_values"] - theirs["pixel_values"]).abs().max().item()
    if difference > PIXEL_TOLERANCE:
        sys.exit(f"pixel values differ by {difference}, so times cannot be compared")
    for our_label, their_label in zip(ours["labels"], theirs["labels"], strict=True):
        torch.testing.assert_close(our_label["boxes"], their_label["boxes"])
    return runs


def random_predictions(num_classes: int) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(2)
    shape = (NUM_LAYERS, BATCH_SIZE, NUM_QUERIES)
    logits = torch.randn(*shape, num_classes, generator=generator)
    boxes = torch.rand(*shape, 4, generator=generator) * 0.4 + 0.3
    labels = [
        {
            "class_labels": torch.randint(NUM_LABELS, (OBJECTS_PER_PICTURE,), generator=generator),
            "boxes": torch.rand(OBJECTS_PER_PICTURE, 4, generator=generator) * 0.4 + 0.3,
        }
        for _ in range(BATCH_SIZE)
    ]
    return logits.requires_grad_(), boxes.requires_grad_(), labels


def loss_runs(uses_softmax: bool) -> dict[str, Callable[[], float]]:
    logits, boxes, labels = random_predictions(NUM_LABELS + uses_softmax)
    criterion = SetCriterion(
        SoftmaxClassification(no_object_weight=0.1) if uses_softmax else FocalClassification(),
        **COSTS,
        cls_loss_coefficient=1,
        bbox_loss_coefficient=5,
        giou_loss_coefficient=2,
    )
    config_class = transformers.DetrConfig if uses_softmax else transformers.DeformableDetrConfig
    config = config_class(num_labels=NUM_LABELS, auxiliary_loss=True, **COSTS)
    their_loss = ForObjectDetectionLoss if uses_softmax else DeformableDetrForObjectDetectionLoss

    def ours() -> float:
        loss, _ = criterion(SetPredictions(logits=logits, pred_boxes=boxes), labels)
        torch.autograd.grad(loss, (logits, boxes))
        return loss.item()

    def theirs() -> float:
        loss, *_ = their_loss(
            logits[-1],
            labels,
            logits.device,
            boxes[-1],
            config,
            outputs_class=logits,
            outputs_coord=boxes,
        )
        torch.autograd.grad(loss, (logits, boxes))
        return loss.item()

    if abs(ours() / theirs() - 1) > LOSS_TOLERANCE:
        sys.exit(f"losses differ, {ours()} and {theirs()}, so times cannot be compared")
    return {"hf_querydet": ours, "transformers": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--note", default="", help="kept in the json: what else the machine did")
    parser.add_argument("--output", type=Path, help="json with all numbers")
    options = parser.parse_args()

    report = {
        "command": shlex.join(["python", *sys.argv]),
        **describe_machine(options.note),
        "rounds": options.rounds,
        "cases": {},
    }
    cases = {
        "processor with annotations": processor_runs,
        "matching and loss, softmax": lambda: loss_runs(uses_softmax=True),
        "matching and loss, focal": lambda: loss_runs(uses_softmax=False),
    }
    for title, build in cases.items():
        runs = build()
        times = alternate(runs, options.rounds)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratio = median_ratio(times["transformers"], times["hf_querydet"])
        report["cases"][title] = {"seconds": medians, "times_faster": ratio}
        print(
            f"{title:28} {1e3 * medians['hf_querydet']:7.1f} ms, transformers "
            f"{1e3 * medians['transformers']:7.1f} ms: {ratio:5.2f} times faster",
            flush=True,
        )
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
