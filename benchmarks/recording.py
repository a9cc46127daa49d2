"""What it costs that a detector can record its decoder: off, on, and in a version without it.

    python benchmarks/recording.py [--variants detr ...] [--size 800x1066] [--rounds 5]
        [--baseline CHECKOUT] [--output FILE.json]

CHECKOUT holds the package at a commit from before recording existed (`git worktree add`); it runs
in a process of its own. All take turns within each round, on one picture, from pixels to logits and
boxes under `no_grad`; a ratio is the median over rounds. ResNet-50 from random weights, the papers'
first configuration of each variant.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import alternate, describe_machine, median_ratio, peak_extra_bytes

from hf_querydet import VARIANTS


def forward(variant: str, size: str, **options: Any) -> Callable[[], list[torch.Tensor]]:
    """One forward of a model whose weights are the same in every process."""
    torch.manual_seed(0)
    config_class = VARIANTS[variant].config
    name = next(iter(config_class.named_configurations))
    config = config_class.from_name(name, use_pretrained_backbone=False)
    model = VARIANTS[variant].detector(config).eval()
    pixel_values = torch.randn(1, 3, *map(int, size.split("x")))

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        outputs = model(pixel_values, **options)
        return [outputs.logits, outputs.pred_boxes]

    return run


class BaselineProcess:
    """Another version of the package: runs its forward whenever it is called."""

    def __init__(self, checkout: str, variant: str, size: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", variant, "--size", size],
            env={**os.environ, "PYTHONPATH": checkout},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.peak = int(self.process.stdout.readline())

    def __call__(self) -> None:
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(variant: str, size: str) -> None:
    """Print the peak of memory, then run once for every line that comes in."""
    run = forward(variant, size)
    run()
    print(peak_extra_bytes(run), flush=True)
    for _ in sys.stdin:
        run()
        print("done", flush=True)


def measure_case(variant: str, size: str, rounds: int, baseline: str | None) -> dict[str, Any]:
    runs = {"off": forward(variant, size), "on": forward(variant, size, output_recording=True)}
    for run in runs.values():
        run()
    peaks = {name: peak_extra_bytes(run) for name, run in runs.items()}
    if baseline is not None:
        runs["without"] = BaselineProcess(baseline, variant, size)
        peaks["without"] = runs["without"].peak
        runs["without"]()
    times = alternate(runs, rounds)
    if baseline is not None:
        runs["without"].close()
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "times_as_long_as_off": {
            name: median_ratio(values, times["off"]) for name, values in times.items()
        },
        "peak_mb": {name: peak / 1e6 for name, peak in peaks.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--size", default="800x1066", help="HxW of the picture")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--baseline", help="checkout of a version without recording")
    parser.add_argument("--note", default="", help="kept in the json: what else the machine did")
    parser.add_argument("--output", type=Path, help="json with all numbers")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.size)
        return

    # The directory is a matter of the machine.
    command = shlex.join(["python", *sys.argv])
    if options.baseline:
        command = command.replace(options.baseline, "CHECKOUT")
    report = {
        "command": command,
        **describe_machine(options.note),
        "rounds": options.rounds,
        "cases": [],
    }
    for variant in options.variants:
        case = measure_case(variant, options.size, options.rounds, options.baseline)
        report["cases"].append({"variant": variant, "size": options.size} | case)
        print(f"\n{variant}, {options.size}")
        for name, seconds in case["seconds"].items():
            print(
                f"  {name:8} {1e3 * seconds:8.0f} ms, {case['times_as_long_as_off'][name]:.3f} of "
                f"off   memory {case['peak_mb'][name]:7.0f} MB",
                flush=True,
            )
        if options.output:  # after every case: a stopped run keeps what it has
            options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
