"""Deformable convolution and RoIAlign on deformable attention's kernels, beside torchvision's.

    python benchmarks/torchvision_operators.py [--device cuda] [--rounds 7] [--output FILE.json]

Both are written with `ms_deform_attn` (Dynamic DETR's encoder; the region features of Dynamic DETR
and Sparse R-CNN). Cases: the finest map of an 800x1066 picture at stride 8 with 256 channels, and
eight pictures of 256x192 with 128, as in the small recipes. RoIAlign: 300 or 8 times 100 boxes of
32 to 256 pixels, 7x7 bins of 2x2 samples, from the levels of strides 4 to 32; torchvision is called
once per level, on the boxes of the level.

Results are compared before anything is timed. The implementations take turns within each round;
gradients are those of everything that has one in training.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import describe_machine, measure_case, print_case
from torch import Tensor
from torchvision.ops import deform_conv2d, roi_align

from hf_querydet.layers.feature_levels import flatten_levels
from hf_querydet.layers.roi_pooling import assign_levels, pool_regions
from hf_querydet.models.dynamic_detr.dynamic_encoder import deformable_convolution

FINEST_LEVEL, COARSEST_LEVEL = 2, 5
BINS, SAMPLES_PER_SIDE = 7, 2
TOLERANCE = 1e-4


@dataclass
class Case:
    """Two functions of the same inputs, with equal results."""

    title: str
    runs: dict[str, Callable[..., Tensor]]
    inputs: list[Tensor]


def convolution_case(batch_size: int, channels: int, height: int, width: int) -> Case:
    def torchvisions(features: Tensor, weight: Tensor, offsets: Tensor, mask: Tensor) -> Tensor:
        return deform_conv2d(features, offsets, weight, padding=1, mask=mask)

    return Case(
        f"deformable convolution, {batch_size} x {channels} x {height} x {width}",
        {"hf_querydet": deformable_convolution, "torchvision": torchvisions},
        [
            torch.randn(batch_size, channels, height, width),
            torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5,
            torch.randn(batch_size, 18, height, width),
            torch.rand(batch_size, 9, height, width),
        ],
    )


def pooling_case(
    batch_size: int, channels: int, height: int, width: int, num_boxes: int, device: str
) -> Case:
    """`height` and `width` of the picture."""
    strides = [2**level for level in range(FINEST_LEVEL, COARSEST_LEVEL + 1)]
    levels = [torch.randn(batch_size, channels, height // s, width // s) for s in strides]
    sides = 2 ** torch.empty(batch_size, num_boxes, 2).uniform_(5, 8)
    corners = torch.rand(batch_size, num_boxes, 2) * torch.tensor([width, height]) - sides / 2
    boxes = torch.cat([corners, corners + sides], dim=-1).to(device)
    pictures = torch.arange(batch_size).repeat_interleave(num_boxes)[:, None]
    rois = torch.cat([pictures.to(boxes), boxes.flatten(0, 1)], dim=1)
    level_of = assign_levels(rois[:, 1:], finest_level=FINEST_LEVEL, coarsest_level=COARSEST_LEVEL)

    def ours(*levels: Tensor) -> Tensor:
        return pool_regions(*flatten_levels(levels), boxes, finest_level=FINEST_LEVEL)

    def torchvisions(*levels: Tensor) -> Tensor:
        pooled = levels[0].new_zeros(len(rois), channels, BINS, BINS)
        for level, (features, stride) in enumerate(zip(levels, strides, strict=True)):
            chosen = (level_of == FINEST_LEVEL + level).nonzero().squeeze(1)
            pooled[chosen] = roi_align(
                features, rois[chosen], BINS, 1 / stride, SAMPLES_PER_SIDE, aligned=True
            )
        return pooled.flatten(2).transpose(1, 2).unflatten(0, (batch_size, num_boxes))

    return Case(
        f"RoIAlign, {batch_size} x {num_boxes} boxes, {channels} channels, {height}x{width}",
        {"hf_querydet": ours, "torchvision": torchvisions},
        levels,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--note", default="", help="kept in the json: what else the machine did")
    parser.add_argument("--output", type=Path, help="json with all numbers")
    options = parser.parse_args()

    torch.manual_seed(0)
    cases = [
        convolution_case(1, 256, 100, 134),
        convolution_case(8, 128, 24, 32),
        pooling_case(1, 256, 800, 1088, 300, options.device),
        pooling_case(8, 128, 192, 256, 100, options.device),
    ]
    report = {
        "command": shlex.join(["python", *sys.argv]),
        **describe_machine(options.note, options.device),
        "rounds": options.rounds,
        "cases": [],
    }
    for case in cases:
        # Activations have their channels last here.
        inputs = [
            tensor.to(options.device).contiguous(memory_format=torch.channels_last)
            for tensor in case.inputs
        ]
        ours, theirs = (run(*inputs) for run in case.runs.values())
        difference = (ours - theirs).abs().max().item()
        if difference > TOLERANCE:
            sys.exit(f"{case.title}: results differ by {difference}; times cannot be compared")
        for direction in ("forward", "forward+backward"):
            results = measure_case(
                case.runs,
                inputs,
                None if direction == "forward" else torch.ones_like(ours),
                device=options.device,
                rounds=options.rounds,
                baselines=["torchvision"],
            )
            report["cases"].append({"case": case.title, "direction": direction, "results": results})
            print_case(f"{case.title}, {direction}", results)
            if options.output:  # after every case: a stopped run keeps what it has
                options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
