"""Whole detectors beside those of transformers: inference, training step, peak memory.

    python benchmarks/end_to_end.py [--variants detr ...] [--sizes 800x1066 ...] [--rounds 5]
        [--batch-sizes 1] [--output FILE.json]

Both libraries run the same weights: transformers' model is saved and loaded here, and its
detections on a padded batch are compared first. Inference is forward under `no_grad`, from pixels
to logits and boxes. A training step is forward with dropout, matching, loss with auxiliary terms,
backward, clipping and AdamW, on pictures with 10 objects each. The libraries take turns within each
round; a ratio is the median over rounds.

The backbone is ResNet-50 at 800 pixels and ResNet-18 below, from random weights, with frozen batch
norm as for pretrained ones.
"""

import argparse
import copy
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import alternate, describe_machine, median_ratio, peak_extra_bytes
from torch import Tensor, nn
from transformers.models.timm_backbone import TimmBackboneConfig

from hf_querydet import VARIANTS

PEERS = {
    "detr": "Detr",
    "deformable_detr": "DeformableDetr",
    "conditional_detr": "ConditionalDetr",
}
STAGES = {"detr": [4], "conditional_detr": [4], "deformable_detr": [2, 3, 4]}
NUM_LABELS = 91
OBJECTS_PER_PICTURE = 10
# Sums in another order; logits are of order 1.
TOLERANCE = 1e-4


def build_pair(variant: str, backbone: str) -> dict[str, nn.Module]:
    """The same random weights in both libraries' models."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{PEERS[variant]}Config")(
        backbone_config=TimmBackboneConfig(
            backbone=backbone, out_indices=STAGES[variant], use_pretrained_backbone=False
        ),
        num_labels=NUM_LABELS,
        auxiliary_loss=False,
    )
    theirs = getattr(transformers, f"{PEERS[variant]}ForObjectDetection")(config)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = VARIANTS[variant].detector.from_pretrained(directory)
    return {"hf_querydet": ours, "transformers": theirs}


def make_batch(batch_size: int, height: int, width: int, padded: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    batch = {
        "pixel_values": torch.randn(batch_size, 3, height, width, generator=generator),
        "pixel_mask": torch.ones(batch_size, height, width, dtype=torch.int64),
    }
    if padded:
        batch["pixel_mask"][-1, :, width * 3 // 4 :] = 0
        batch["pixel_values"] *= batch["pixel_mask"][:, None]
    return batch


def make_labels(batch_size: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "class_labels": torch.randint(NUM_LABELS, (OBJECTS_PER_PICTURE,), generator=generator),
            "boxes": torch.rand(OBJECTS_PER_PICTURE, 4, generator=generator) * 0.4 + 0.3,
        }
        for _ in range(batch_size)
    ]


@torch.no_grad()
def largest_difference(models: dict[str, nn.Module], batch: dict[str, Tensor]) -> float:
    outputs = [model.eval()(**batch) for model in models.values()]
    return max(
        (getattr(outputs[0], field) - getattr(outputs[1], field)).abs().max().item()
        for field in ("logits", "pred_boxes")
    )


def inference(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        with torch.no_grad():
            outputs = model(**batch)
        return [outputs.logits, outputs.pred_boxes]

    return run


def training_step(
    model: nn.Module, batch: dict[str, Tensor], labels: list[dict[str, Tensor]]
) -> Callable[[], None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-6)

    def run() -> None:
        model(**batch, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(trainable, 0.1)
        optimizer.step()
        optimizer.zero_grad()

    return run


def measure(runs: dict[str, Callable], rounds: int) -> dict[str, Any]:
    for run in runs.values():
        run()
    peaks = {name: peak_extra_bytes(run) for name, run in runs.items()}
    times = alternate(runs, rounds)
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "times_faster": median_ratio(times["transformers"], times["hf_querydet"]),
        "peak_mb": {name: peak / 1e6 for name, peak in peaks.items()},
        "memory_ratio": peaks["hf_querydet"] / peaks["transformers"],
    }


def measure_case(variant: str, height: int, width: int, batch_size: int, rounds: int) -> dict:
    models = build_pair(variant, "resnet50" if min(height, width) >= 600 else "resnet18")
    difference = largest_difference(models, make_batch(2, 128, 160, padded=True))
    if difference > TOLERANCE:
        sys.exit(f"{variant}: outputs differ by {difference:.1e}, so times cannot be compared")
    batch, labels = make_batch(batch_size, height, width, padded=False), make_labels(batch_size)
    results = {
        "inference": measure(
            {name: inference(model.eval(), batch) for name, model in models.items()}, rounds
        )
    }
    models["transformers"].config.auxiliary_loss = True
    training = {
        name: training_step(copy.deepcopy(model).train(), batch, labels)
        for name, model in models.items()
    }
    results["training step"] = measure(training, rounds)
    return {"largest_difference": difference, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    variants = [variant for variant in PEERS if variant in VARIANTS]
    parser.add_argument("--variants", nargs="+", default=variants, choices=variants)
    parser.add_argument("--sizes", nargs="+", default=["800x1066", "320x426"], help="HxW")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="", help="kept in the json: what else the machine did")
    parser.add_argument("--output", type=Path, help="json with all numbers")
    options = parser.parse_args()

    report = {
        "command": shlex.join(["python", *sys.argv]),
        **describe_machine(options.note),
        "rounds": options.rounds,
        "cases": [],
    }
    for variant in options.variants:
        for size in options.sizes:
            height, width = map(int, size.split("x"))
            for batch_size in options.batch_sizes:
                case = measure_case(variant, height, width, batch_size, options.rounds)
                head = {"variant": variant, "size": size, "batch_size": batch_size}
                report["cases"].append(head | case)
                print(f"\n{variant}, {size}, batch of {batch_size}")
                for name, result in case["results"].items():
                    ours, theirs = result["seconds"].values()
                    print(
                        f"  {name:14} {1e3 * ours:9.0f} ms, transformers {1e3 * theirs:9.0f} ms: "
                        f"{result['times_faster']:5.2f} times faster   memory "
                        f"{result['peak_mb']['hf_querydet']:7.0f} MB of "
                        f"{result['peak_mb']['transformers']:7.0f} MB "
                        f"({result['memory_ratio']:.2f})",
                        flush=True,
                    )
                if options.output:  # after every case: a stopped run keeps what it has
                    options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
