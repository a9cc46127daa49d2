"""Whole detectors, from pictures to boxes and from a batch to a step, beside transformers'.

    python benchmarks/end_to_end.py [--variants detr ...] [--sizes 800x1066 320x426]
        [--batch-sizes 1 4] [--modes bf16 compile bf16-compile] [--kinds inference "training step"]
        [--rounds 5] [--output FILE.json]

Where transformers has the detector, both libraries run the same weights: its model is saved and
loaded here, and its detections on a padded batch are compared first. Inference is forward under
`no_grad`, from pixels to logits and boxes. A training step is forward with dropout, matching, loss
with auxiliary terms, backward, clipping and AdamW, on pictures with 10 objects each. Libraries and
modes take turns within each round; a ratio is the median over rounds.

The parts of it are measured in a second run of ours: image processor (from photographs of 640x480
pixels), backbone, the rest of the model, post-processing; forward without loss, matching, loss
without matching, backward, optimizer.

What would need more memory than the machine has, by its peak with the smallest batch, is left out.

A mode is another way to run ours: autocast to bfloat16, `torch.compile`, or both. In training,
what leads to the predictions is compiled; matching reads costs on the host. `--kinds
"training step"` measures no inference.

The backbone is ResNet-50 at 600 pixels and more and ResNet-18 below, from random weights, with
frozen batch norm as for pretrained ones.
"""

import argparse
import copy
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import (
    alternate,
    available_bytes,
    describe_machine,
    median_ratio,
    peak_extra_bytes,
    photographs,
)
from torch import Tensor, nn
from transformers.models.timm_backbone import TimmBackboneConfig

from hf_querydet import VARIANTS

PEERS = {
    "detr": "Detr",
    "deformable_detr": "DeformableDetr",
    "conditional_detr": "ConditionalDetr",
}
MODES = ["bf16", "compile", "bf16-compile"]
INFERENCE, TRAINING = KINDS = ("inference", "training step")
STAGES = {"detr": [4], "conditional_detr": [4], "deformable_detr": [2, 3, 4]}
NUM_LABELS = 91
OBJECTS_PER_PICTURE = 10
# Sums in another order; logits are of order 1.
TOLERANCE = 1e-4


def build_models(variant: str, backbone: str) -> dict[str, nn.Module]:
    """Ours, and transformers' with the same weights where it has one."""
    torch.manual_seed(0)
    row = VARIANTS[variant]
    if variant not in PEERS:
        config = row.config(
            backbone=backbone,
            num_labels=NUM_LABELS,
            backbone_norm="frozen",
            frozen_backbone_stages=2,
        )
        return {"hf_querydet": row.detector(config)}
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
        ours = row.detector.from_pretrained(directory)
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


def precision(mode: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if "bf16" in mode else nullcontext()


def inference(
    model: nn.Module, batch: dict[str, Tensor], mode: str = ""
) -> Callable[[], list[Tensor]]:
    forward = torch.compile(model) if "compile" in mode else model

    def run() -> list[Tensor]:
        with torch.no_grad(), precision(mode):
            outputs = forward(**batch)
        return [outputs.logits, outputs.pred_boxes]

    return run


def training_step(
    model: nn.Module,
    batch: dict[str, Tensor],
    labels: list[dict[str, Tensor]],
    mode: str = "",
    clock: "Clock | None" = None,
) -> Callable[[], None]:
    if "compile" in mode:
        model.model.compile()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-6)
    clock = clock or Clock()

    def forward() -> Tensor:
        with precision(mode):
            return model(**batch, labels=labels).loss

    def update() -> None:
        nn.utils.clip_grad_norm_(trainable, 0.1)
        optimizer.step()
        optimizer.zero_grad()

    def run() -> None:
        loss = clock.run("forward", forward)
        clock.run("backward", loss.backward)
        clock.run("optimizer", update)

    return run


class Clock:
    """Seconds of every call of the functions it runs, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def run(self, name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self.seconds[name].append(time.perf_counter() - start)
        return result

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Let every call of a method count."""
        function = getattr(owner, attribute)
        setattr(owner, attribute, lambda *args, **kwargs: self.run(name, function, *args, **kwargs))

    def parts(self, within: dict[str, str]) -> dict[str, float]:
        """Medians; those that run once inside others are taken off them."""
        medians = {name: statistics.median(values) for name, values in self.seconds.items()}
        return medians | {outer: medians[outer] - medians[inner] for inner, outer in within.items()}


def inference_parts(
    variant: str, model: nn.Module, size: tuple[int, int], batch_size: int, rounds: int
) -> dict[str, float]:
    """Seconds of everything between pictures and boxes."""
    model, clock = copy.deepcopy(model).eval(), Clock()
    shape = {"shortest_edge": min(size), "longest_edge": max(size)}
    processor = VARIANTS[variant].image_processor.for_config(model.config, size=shape)
    pictures = photographs(batch_size, 480, 640)
    sizes = [picture.size[::-1] for picture in pictures]
    clock.watch(model.model.backbone, "forward", "backbone")
    with torch.no_grad():
        for call in range(1 + rounds):
            if call == 1:  # the first call warms up
                clock.seconds.clear()
            inputs = clock.run("processor", processor, pictures, return_tensors="pt")
            outputs = clock.run("rest of the model", model, **inputs)
            clock.run(
                "post-processing",
                processor.post_process_object_detection,
                outputs,
                threshold=0.5,
                target_sizes=sizes,
            )
    return clock.parts({"backbone": "rest of the model"})


def training_parts(
    model: nn.Module, batch: dict[str, Tensor], labels: list[dict[str, Tensor]], rounds: int
) -> dict[str, float]:
    """Seconds of everything in a training step."""
    model, clock = copy.deepcopy(model).train(), Clock()
    clock.watch(model.criterion, "_match", "matching")
    clock.watch(model, "criterion", "loss")
    step = training_step(model, batch, labels, clock=clock)
    step()
    clock.seconds.clear()
    for _ in range(rounds):
        step()
    return clock.parts({"loss": "forward", "matching": "loss"})


def measure(runs: dict[str, Callable], rounds: int) -> dict[str, Any]:
    """Times and peaks; ratios are our plain mode against each other run."""
    for run in runs.values():
        run()
    peaks = {name: peak_extra_bytes(run) for name, run in runs.items()}
    times = alternate(runs, rounds)
    others = [name for name in runs if name != "hf_querydet"]
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "times_faster_than": {
            name: median_ratio(times[name], times["hf_querydet"]) for name in others
        },
        "peak_mb": {name: peak / 1e6 for name, peak in peaks.items()},
        "memory_of": {name: peaks["hf_querydet"] / peaks[name] for name in others},
    }


def measure_case(
    variant: str,
    size: tuple[int, int],
    batch_size: int,
    options: argparse.Namespace,
    smaller: dict[str, Any] | None,
) -> dict[str, Any]:
    """One size and batch of a variant; `smaller` is the case of its smallest batch."""
    models = build_models(variant, "resnet50" if min(size) >= 600 else "resnet18")
    case: dict[str, Any] = {}
    if "transformers" in models:
        difference = largest_difference(models, make_batch(2, 128, 160, padded=True))
        if difference > TOLERANCE:
            sys.exit(f"{variant}: outputs differ by {difference:.1e}; times cannot be compared")
        case["largest_difference"] = difference
    ours = models["hf_querydet"]
    batch, labels = make_batch(batch_size, *size, padded=False), make_labels(batch_size)

    if INFERENCE in options.kinds:
        # All models share code whose number of compiled versions is limited; beyond it runs
        # plainly.
        torch.compiler.reset()
        runs = {name: inference(model.eval(), batch) for name, model in models.items()}
        runs |= {mode: inference(ours, batch, mode) for mode in options.modes}
        case[INFERENCE] = measure(runs, options.rounds)
        case[INFERENCE]["parts"] = inference_parts(variant, ours, size, batch_size, options.rounds)

    if TRAINING in options.kinds:
        torch.compiler.reset()
        for model in models.values():
            model.config.auxiliary_loss = True
        copies = {name: copy.deepcopy(model).train() for name, model in models.items()}
        runs = {name: training_step(model, batch, labels) for name, model in copies.items()}
        runs |= {
            mode: training_step(copy.deepcopy(ours).train(), batch, labels, mode)
            for mode in options.modes
        }
        if smaller is not None:
            growth = batch_size / smaller["batch_size"]
            peaks = smaller[TRAINING]["peak_mb"]
            too_large = [name for name in runs if growth * peaks[name] * 1e6 > available_bytes()]
            case["left out of training"] = too_large
            runs = {name: run for name, run in runs.items() if name not in too_large}
        case[TRAINING] = measure(runs, options.rounds)
        case[TRAINING]["parts"] = training_parts(ours, batch, labels, options.rounds)
    return case


def print_result(title: str, result: dict[str, Any]) -> None:
    print(f"  {title}")
    for name, seconds in result["seconds"].items():
        line = f"    {name:14} {1e3 * seconds:9.0f} ms {result['peak_mb'][name]:8.0f} MB"
        if name == "transformers":
            line += (
                f"   ours is {result['times_faster_than'][name]:.2f} times faster, "
                f"with {result['memory_of'][name]:.2f} of its memory"
            )
        elif name in MODES:
            line += f"   {1 / result['times_faster_than'][name]:.2f} times faster than plain"
        print(line)
    parts = (f"{name} {1e3 * seconds:.0f}" for name, seconds in result["parts"].items())
    print(f"    parts in ms: {', '.join(parts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--sizes", nargs="+", default=["800x1066", "320x426"], help="HxW")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--modes", nargs="+", default=[], choices=MODES)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
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
            smaller = None
            for batch_size in sorted(options.batch_sizes):
                case = {"variant": variant, "size": size, "batch_size": batch_size}
                case |= measure_case(variant, (height, width), batch_size, options, smaller)
                smaller = smaller or case
                report["cases"].append(case)
                print(f"\n{variant}, {size}, batch of {batch_size}")
                for kind in options.kinds:
                    print_result(kind, case[kind])
                if options.output:  # after every case: a stopped run keeps what it has
                    options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
