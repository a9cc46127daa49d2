"""The yardstick: a small detector from random weights, 30 minutes of training, real pictures.

    python benchmarks/bccd.py VARIANT --data DIRECTORY [--minutes 30] [--library transformers]

DIRECTORY holds `train` and `validation`, each a picture folder with metadata.jsonl; the numbers in
benchmarks/results are those of BCCD's blood cells (205 and 87 pictures, 3 classes).

Detector and settings are those of the small recipe (`hf_querydet/models/VARIANT/recipe.py`,
`--recipe small` of the training script): ResNet-18, 128 channels, 3 encoder layers (of Deformable
and Efficient DETR; the others have none), 3 decoder layers (Efficient DETR 1, Sparse R-CNN and
Dynamic DETR 6), 100 queries, pictures of 256x192, batches of 8, the papers' augmentation, AdamW.
The clock counts training, not evaluation; the learning rate follows it, so a faster variant takes
more steps.

`--library transformers` trains transformers' own class of the variant in the same way, on the same
ResNet of timm, all of which is made trainable for it; its DETR has positions in every attention.
`--save DIRECTORY` keeps the detector; `--backbone-of DIRECTORY` starts another with its backbone.
`--tune` evaluates on every fifth training picture and trains on the others, for choosing settings
without looking at the validation pictures.
`--device cuda --workers 2` is no yardstick: a run to stand beside it, with more steps, or larger
pictures by `--recipe-fields '{"shortest_edge": 480, "longest_edge": 640}'`. The json names the GPU.
Without a GPU, `--steps` and `--mixed-precision bf16` make such a run too, if the processor
multiplies in bfloat16.
"""

import argparse
import dataclasses
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import send_to_device
from measuring import describe_machine
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForObjectDetection, set_seed

from hf_querydet import VARIANTS
from hf_querydet.data import DetectionAugmentation, DetectionCollator, load_detection_dataset
from hf_querydet.evaluation import CocoEvaluator, format_table
from hf_querydet.modeling_utils import DetectorPreTrainedModel
from hf_querydet.recipe_utils import SmallRecipe
from hf_querydet.training import parameter_groups

# In the course of a run, for the curve; the last one is the result.
EVALUATIONS = 10
# transformers' classes of the same variants; the other four exist in no other library of its kind.
PEERS = {
    "detr": "Detr",
    "deformable_detr": "DeformableDetr",
    "conditional_detr": "ConditionalDetr",
}


def build_detector(library: str, variant: str, fields: dict[str, Any]) -> nn.Module:
    """A new detector; both libraries get the same fields."""
    if library == "hf_querydet":
        return VARIANTS[variant].detector(VARIANTS[variant].config(**fields))
    fields = dict(fields)
    stages = fields.pop("backbone_kwargs", {"out_indices": [2, 3, 4]})["out_indices"]
    backbone = transformers.TimmBackboneConfig(
        backbone=fields.pop("backbone"), out_indices=stages, use_pretrained_backbone=False
    )
    id2label = fields.pop("id2label")
    config = getattr(transformers, f"{PEERS[variant]}Config")(
        backbone_config=backbone,
        auxiliary_loss=True,
        id2label=id2label,
        label2id={name: label for label, name in id2label.items()},
        **fields,
    )
    model = getattr(transformers, f"{PEERS[variant]}ForObjectDetection")(config)
    train_whole_backbone(model)
    return model


def train_whole_backbone(model: nn.Module) -> None:
    """Let a model of transformers train its backbone, norms too, as ours does from random weights.

    As it comes, its first stage and all norms stay as they were drawn.
    """
    model.model.unfreeze_backbone()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("FrozenBatchNorm2d"):
                norm = nn.BatchNorm2d(len(child.weight))
                norm.weight.data.copy_(child.weight)
                setattr(parent, name, norm)


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero; `progress` is the share of the budget that is used."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min((progress - warmup) / (1 - warmup), 1.0)))


class Clock:
    """Seconds since it was made, by the wall and of the processor, without its pauses."""

    def __init__(self) -> None:
        self.wall_started, self.processor_started = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return (
            time.perf_counter() - self.wall_started,
            time.process_time() - self.processor_started,
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        wall, processor = self.read()
        yield
        later_wall, later_processor = self.read()
        self.wall_started += later_wall - wall
        self.processor_started += later_processor - processor


def train(
    model: nn.Module,
    loader: DataLoader,
    recipe: SmallRecipe,
    options: argparse.Namespace,
    evaluate_model: Callable[[], dict[str, Any]],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Train until the budget is used.

    Returns:
        Steps, seconds, the metrics at the end, the curve of the loss, and of AP. `keep` gets the
        same after each evaluation.
    """
    groups = parameter_groups(model, recipe)
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses, loss_curve, ap_curve, step = [], [], [], 0
    model.train()
    clock = Clock()
    while True:
        for batch in loader:
            seconds, processor_seconds = clock.read()
            progress = step / options.steps if options.steps else seconds / (60 * options.minutes)
            if progress * EVALUATIONS >= len(ap_curve) + 1:
                with clock.paused():
                    metrics = evaluate_model()
                    model.train()
                    point = {name: metrics[name] for name in ("map", "map_50")}
                    ap_curve.append({"step": step, "seconds": seconds} | point)
                    print(f"{step:6d} steps  AP {metrics['map']:.3f}  AP50 {metrics['map_50']:.3f}")
                    run = {
                        "steps": step,
                        "seconds": seconds,
                        "processor_seconds": processor_seconds,
                        "metrics": metrics,
                        "ap_curve": ap_curve,
                        "loss_curve": loss_curve,
                    }
                    keep(run)
                if progress >= 1:
                    return run
            if isinstance(model, DetectorPreTrainedModel):
                model.set_training_progress(progress)
            factor = learning_rate_factor(progress, recipe.warmup_fraction)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            with torch.autocast(
                options.device, torch.bfloat16, enabled=options.mixed_precision == "bf16"
            ):
                loss = model(**send_to_device(batch, options.device)).loss
            if not torch.isfinite(loss):
                sys.exit(f"the loss is {loss.item()} at step {step}")
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
            if step % 50 == 0:
                recent = losses[-50:]
                loss = sum(recent) / len(recent)
                loss_curve.append({"step": step, "seconds": seconds, "loss": loss})
                print(f"{step:6d} steps  {seconds:6.0f} s  loss {loss:.3f}", flush=True)


@torch.no_grad()
def evaluate(model: nn.Module, processor: Any, loader: DataLoader, id2label: dict) -> dict:
    model.eval()
    device = next(model.parameters()).device
    evaluator = CocoEvaluator(id2label)
    for batch in loader:
        batch = send_to_device(batch, device)
        outputs = model(batch["pixel_values"], batch["pixel_mask"])
        sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
        evaluator.update(
            processor.post_process_object_detection(outputs, 0.0, sizes), batch["labels"]
        )
    return evaluator.compute()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=list(VARIANTS))
    parser.add_argument("--data", required=True, help="directory with train and validation")
    parser.add_argument("--minutes", type=float, default=30, help="of training")
    parser.add_argument("--steps", type=int, help="a budget in steps instead")
    parser.add_argument("--library", default="hf_querydet", choices=["hf_querydet", "transformers"])
    parser.add_argument(
        "--model-fields",
        type=json.loads,
        default={},
        help="""other fields of the configuration, json: '{"dropout": 0.1}'""",
    )
    parser.add_argument(
        "--recipe-fields",
        type=json.loads,
        default={},
        help="""other settings of training, json: '{"learning_rate": 1e-4}'""",
    )
    parser.add_argument("--save", type=Path, help="directory for the trained detector")
    parser.add_argument(
        "--backbone-of",
        type=Path,
        help="directory of a saved detector to take the backbone from, one of the same stages",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--mixed-precision",
        default="no",
        choices=["no", "bf16"],
        help="of training; evaluation is in float32",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes that prepare pictures for a GPU; on a CPU they take time from training",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="keep away from the validation data")
    parser.add_argument("--note", default="", help="kept in the json: what else the machine did")
    parser.add_argument("--output", type=Path, help="json with settings, curve and numbers")
    options = parser.parse_args()
    if options.library == "transformers" and options.variant not in PEERS:
        parser.error(f"transformers has no {options.variant}, only {', '.join(PEERS)}")
    if options.library == "transformers" and options.backbone_of:
        parser.error("--backbone-of is for detectors of hf_querydet, not of --library transformers")
    variant = VARIANTS[options.variant]
    recipe = dataclasses.replace(variant.small_recipe, **options.recipe_fields)
    fields = {**recipe.model_fields, **options.model_fields}
    if options.library == "transformers":
        fields.pop("position_embeddings_at", None)  # theirs are added in every attention

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
    size = {"shortest_edge": recipe.shortest_edge, "longest_edge": recipe.longest_edge}
    processor = variant.image_processor(size=size)
    id2label = train_data.id2label
    model = build_detector(options.library, options.variant, fields | {"id2label": id2label})
    if options.backbone_of:
        trained = AutoModelForObjectDetection.from_pretrained(options.backbone_of)
        model.model.backbone.load_state_dict(trained.model.backbone.state_dict())
    model.to(options.device)
    loading = {
        "batch_size": recipe.batch_size,
        "collate_fn": DetectionCollator(processor),
        "num_workers": options.workers,
        "persistent_workers": options.workers > 0,
    }
    train_loader = DataLoader(
        train_data.with_processor(processor, DetectionAugmentation(processor)),
        shuffle=True,
        drop_last=True,
        **loading,
    )
    eval_loader = DataLoader(eval_data.with_processor(processor), **loading)

    report = {
        # The directory is a matter of the machine.
        "command": shlex.join(["python", *sys.argv]).replace(options.data, "DIRECTORY"),
        **describe_machine(options.note, options.device),
        "variant": options.variant,
        "library": options.library,
        "recipe": dataclasses.asdict(recipe) | {"model_fields": fields},
        "seed": options.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "evaluated_on": "every fifth training picture" if options.tune else "validation",
        "pictures": {"train": len(train_data), "evaluation": len(eval_data)},
    }
    # A run that is stopped leaves what it had by its last evaluation, under this name.
    partial = options.output and options.output.with_suffix(".partial")

    def keep(run: dict[str, Any]) -> None:
        if partial:
            partial.write_text(json.dumps(report | run, indent=2) + "\n")

    run = train(
        model,
        train_loader,
        recipe,
        options,
        lambda: evaluate(model, processor, eval_loader, id2label),
        keep,
    )
    print(format_table(run["metrics"]))
    if partial:
        os.replace(partial, options.output)
    if options.save:
        model.save_pretrained(options.save)
        processor.save_pretrained(options.save)


if __name__ == "__main__":
    main()
