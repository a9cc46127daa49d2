"""The yardstick: a small detector from random weights, 30 minutes of training, real pictures.

    python benchmarks/bccd.py VARIANT --data DIRECTORY [--minutes 30] [--library transformers]

DIRECTORY holds `train` and `validation`, each a picture folder with metadata.jsonl; the numbers in
benchmarks/results are those of BCCD's blood cells (205 and 87 pictures, 3 classes).

The same for every variant: ResNet-18, 128 channels, 3 encoder layers where the variant has an
encoder, 3 decoder layers (Efficient DETR 1), 100 queries, pictures of 256x192, batches of 8, the
papers' augmentation, AdamW. The clock counts training, not evaluation; the learning rate follows
it (warm-up over the first twentieth, then a cosine), so a faster variant takes more steps.

`--library transformers` trains transformers' own class of the variant in the same way. `--tune`
evaluates on every fifth training picture and trains on the others, for choosing settings without
looking at the validation pictures.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import describe_machine
from torch import nn
from torch.utils.data import DataLoader
from transformers import set_seed

from hf_querydet import VARIANTS
from hf_querydet.data import DetectionAugmentation, DetectionCollator, load_detection_dataset
from hf_querydet.evaluation import CocoEvaluator, format_table
from hf_querydet.modeling_utils import DetectorPreTrainedModel

SIZE = {"shortest_edge": 192, "longest_edge": 256}
COMMON = {"d_model": 128, "num_queries": 100}
LAYERS = {"encoder_layers": 3, "decoder_layers": 3}
ATTENTION = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
FEED_FORWARD = {"encoder_ffn_dim": 512, "decoder_ffn_dim": 512}
STAGES = {"decoder_layers": 3, "decoder_attention_heads": 8, "decoder_ffn_dim": 512}
SETTINGS: dict[str, dict[str, Any]] = {
    "detr": LAYERS | ATTENTION | FEED_FORWARD,
    "deformable_detr": LAYERS | ATTENTION | FEED_FORWARD | {"with_box_refine": True},
    "conditional_detr": LAYERS | ATTENTION | FEED_FORWARD,
    "efficient_detr": LAYERS | ATTENTION | FEED_FORWARD | {"decoder_layers": 1},
    "anchor_detr": LAYERS
    | ATTENTION
    | FEED_FORWARD
    | {"num_query_positions": 50, "num_query_patterns": 2},
    "sparse_rcnn": STAGES | {"dynamic_dim": 32},
    "dynamic_detr": STAGES | {"encoder_layers": 3},
}
# transformers' classes of the same variants; the other four exist in no other library of its kind.
PEERS = {
    "detr": "Detr",
    "deformable_detr": "DeformableDetr",
    "conditional_detr": "ConditionalDetr",
}
LEARNING_RATE = 4e-4
WARMUP = 0.05
BATCH_SIZE = 8


def build_detector(variant: str, library: str, id2label: dict[int, str]) -> nn.Module:
    """A new detector; both libraries get the same fields."""
    fields = COMMON | SETTINGS[variant] | {"id2label": id2label}
    if library == "hf_querydet":
        return VARIANTS[variant].detector(VARIANTS[variant].config(backbone="resnet18", **fields))
    backbone = transformers.ResNetConfig(
        depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"][-3 if variant == "deformable_detr" else -1 :],
    )
    label2id = {name: label for label, name in id2label.items()}
    config = getattr(transformers, f"{PEERS[variant]}Config")(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        auxiliary_loss=True,
        label2id=label2id,
        **fields,
    )
    return getattr(transformers, f"{PEERS[variant]}ForObjectDetection")(config)


def learning_rate_factor(progress: float) -> float:
    """Linear warm-up, then a cosine to zero; `progress` is the share of the budget that is used."""
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min((progress - WARMUP) / (1 - WARMUP), 1.0)))


def train(model: nn.Module, loader: DataLoader, options: argparse.Namespace) -> dict[str, Any]:
    """Train until the budget is used; returns steps, seconds and the curve of the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=1e-4)
    losses, curve, step = [], [], 0
    model.train()
    started = time.perf_counter()
    processor_started = time.process_time()
    while True:
        for batch in loader:
            seconds = time.perf_counter() - started
            progress = step / options.steps if options.steps else seconds / (60 * options.minutes)
            if progress >= 1:
                return {
                    "steps": step,
                    "seconds": seconds,
                    "processor_seconds": time.process_time() - processor_started,
                    "curve": curve,
                }
            if isinstance(model, DetectorPreTrainedModel):
                model.set_training_progress(progress)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * learning_rate_factor(progress)
            loss = model(**batch).loss
            if not torch.isfinite(loss):
                sys.exit(f"the loss is {loss.item()} at step {step}")
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
            if step % 50 == 0:
                recent = losses[-50:]
                curve.append({"step": step, "seconds": seconds, "loss": sum(recent) / len(recent)})
                print(
                    f"{step:6d} steps  {seconds:6.0f} s  loss {curve[-1]['loss']:.3f}", flush=True
                )


@torch.no_grad()
def evaluate(model: nn.Module, processor: Any, loader: DataLoader, id2label: dict) -> dict:
    model.eval()
    evaluator = CocoEvaluator(id2label)
    for batch in loader:
        outputs = model(batch["pixel_values"], batch["pixel_mask"])
        sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
        evaluator.update(
            processor.post_process_object_detection(outputs, 0.0, sizes), batch["labels"]
        )
    return evaluator.compute()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=list(SETTINGS))
    parser.add_argument("--data", required=True, help="directory with train and validation")
    parser.add_argument("--minutes", type=float, default=30, help="of training")
    parser.add_argument("--steps", type=int, help="a budget in steps instead")
    parser.add_argument("--library", default="hf_querydet", choices=["hf_querydet", "transformers"])
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="keep away from the validation data")
    parser.add_argument("--note", default="", help="kept in the json: what else the machine did")
    parser.add_argument("--output", type=Path, help="json with settings, curve and numbers")
    options = parser.parse_args()
    if options.library == "transformers" and options.variant not in PEERS:
        parser.error(f"transformers has no {options.variant}, only {', '.join(PEERS)}")

    set_seed(options.seed)
    train_data = load_detection_dataset(options.data, split="train")
    if options.tune:
        rows = range(len(train_data))
        eval_data = train_data.select([row for row in rows if row % 5 == 0])
        train_data = train_data.select([row for row in rows if row % 5])
    else:
        eval_data = load_detection_dataset(
            options.data, split="validation", label_table=train_data.label_table
        )
    processor = VARIANTS[options.variant].image_processor(size=SIZE)
    model = build_detector(options.variant, options.library, train_data.id2label)
    loading = {"batch_size": BATCH_SIZE, "collate_fn": DetectionCollator(processor)}
    train_loader = DataLoader(
        train_data.with_processor(processor, DetectionAugmentation(processor)),
        shuffle=True,
        drop_last=True,
        **loading,
    )
    eval_loader = DataLoader(eval_data.with_processor(processor), **loading)

    run = train(model, train_loader, options)
    metrics = evaluate(model, processor, eval_loader, train_data.id2label)
    report = {
        # The directory is a matter of the machine.
        "command": shlex.join(["python", *sys.argv]).replace(options.data, "DIRECTORY"),
        **describe_machine(options.note),
        "variant": options.variant,
        "library": options.library,
        "settings": COMMON | SETTINGS[options.variant],
        "learning_rate": options.learning_rate,
        "batch_size": BATCH_SIZE,
        "seed": options.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "evaluated_on": "every fifth training picture" if options.tune else "validation",
        "pictures": {"train": len(train_data), "evaluation": len(eval_data)},
        **{name: value for name, value in run.items() if name != "curve"},
        "metrics": metrics,
        "curve": run["curve"],
    }
    print(format_table(metrics))
    if options.output:
        partial = options.output.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(partial, options.output)


if __name__ == "__main__":
    main()
