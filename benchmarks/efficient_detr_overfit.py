"""Overfit eight pictures with one decoder layer: dense against center initialisation.

    python benchmarks/efficient_detr_overfit.py DATASET [--steps 80] [--output FILE.json]

DATASET is whatever ``hf_querydet.data.load_detection_dataset`` reads; the first eight pictures of
its training split are used, scaled to fit into 256x192. A small Efficient DETR (ResNet-18 from
random weights, 128 channels, 3 encoder layers and 1 decoder layer) is trained on all eight at once,
with the same seed, number of steps and learning rate for each initialisation:

- ``dense``: queries start at the dense part's best boxes, as the features there;
- ``center``: all queries start at the picture's centre, as the same features;
- ``center, learnable``: all start at the centre, as learned vectors, without a dense part.

The curves are the training loss of the decoder's predictions, which all three have, and AP50 on
the same eight pictures.
"""

import argparse
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Subset
from transformers import set_seed

from hf_querydet import (
    VARIANTS,
    EfficientDETRConfig,
    EfficientDETRForObjectDetection,
    EfficientDETRImageProcessor,
)
from hf_querydet.data import DetectionCollator, load_detection_dataset
from hf_querydet.evaluation import CocoEvaluator
from hf_querydet.training import parameter_groups

NUM_PICTURES = 8
SIZE = {"shortest_edge": 192, "longest_edge": 256}
# Nothing is to be regularised where eight pictures are to be learned by heart.
DETECTOR = {
    "backbone": "resnet18",
    "d_model": 128,
    "encoder_layers": 3,
    "encoder_ffn_dim": 512,
    "decoder_layers": 1,
    "decoder_ffn_dim": 512,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
INITIALISATIONS = {
    "dense": {"reference_point_init": "dense", "query_init": "dense"},
    "center": {"reference_point_init": "center", "query_init": "dense"},
    "center, learnable": {"reference_point_init": "center", "query_init": "learnable"},
}
DECODER_TERMS = ("loss_ce", "loss_bbox", "loss_giou")


def train(name: str, batch: dict[str, Any], id2label: dict[int, str], args: argparse.Namespace):
    """Curves of one initialisation."""
    set_seed(args.seed)
    config = EfficientDETRConfig(id2label=id2label, **DETECTOR, **INITIALISATIONS[name])
    model, processor = EfficientDETRForObjectDetection(config), EfficientDETRImageProcessor()
    recipe = VARIANTS["efficient_detr"].recipe
    groups = parameter_groups(
        model, recipe, learning_rate=args.learning_rate, backbone_learning_rate_factor=1.0
    )
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    losses, precisions = [], []
    for step in range(1, args.steps + 1):
        model.train()
        outputs = model(**batch)
        optimizer.zero_grad()
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        weights = model.criterion.coefficients
        loss = sum(weights[term] * outputs.loss_dict[term].item() for term in DECODER_TERMS)
        losses.append(round(loss, 4))
        if step % args.eval_steps == 0 or step == args.steps:
            precisions.append([step, round(precision(model, processor, batch, id2label), 4)])
            print(f"{name:18} step {step:4}  loss {loss:7.3f}  AP50 {precisions[-1][1]:.3f}")
    return {"loss_per_step": losses, "ap50_by_step": precisions}


@torch.no_grad()
def precision(
    model: EfficientDETRForObjectDetection,
    processor: EfficientDETRImageProcessor,
    batch: dict[str, Any],
    id2label: dict[int, str],
) -> float:
    model.eval()
    evaluator = CocoEvaluator(id2label)
    outputs = model(batch["pixel_values"], batch["pixel_mask"])
    sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
    detections = processor.post_process_object_detection(outputs, 0.0, sizes)
    evaluator.update(detections, batch["labels"])
    return evaluator.compute()["map_50"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("dataset", help="path or Hub id, with a training split")
    parser.add_argument("--steps", type=int, default=80, help="of all eight pictures")
    parser.add_argument("--eval-steps", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of most parameters")
    parser.add_argument("--seed", type=int, default=0, help="of all first values")
    parser.add_argument("--output", type=Path, help="json file that the curves are written to")
    args = parser.parse_args()

    processor = EfficientDETRImageProcessor(size=SIZE)
    data = load_detection_dataset(args.dataset, split="train")
    pictures = Subset(data.with_processor(processor), range(NUM_PICTURES))
    batch = dict(DetectionCollator(processor)(list(pictures)))
    result = {
        # Without the path, which says nothing elsewhere.
        "command": shlex.join(
            ["python", "benchmarks/efficient_detr_overfit.py", "DATASET", *sys.argv[2:]]
        ),
        "dataset": Path(args.dataset).name,
        "settings": {
            "pictures": NUM_PICTURES,
            "objects": sum(len(label["boxes"]) for label in batch["labels"]),
            "canvas": list(batch["pixel_values"].shape[-2:]),
            "detector": DETECTOR,
            "steps": args.steps,
            "learning_rate": args.learning_rate,
            "seed": args.seed,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
        "initialisations": {},
    }
    for name, options in INITIALISATIONS.items():
        curves = train(name, batch, data.id2label, args)
        result["initialisations"][name] = {**options, **curves}
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
