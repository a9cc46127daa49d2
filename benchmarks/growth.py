"""How the time of inference grows with picture size and number of queries, beside its arithmetic.

    python benchmarks/growth.py [--variants detr ...] [--rounds 3] [--output FILE.json]

One picture, ResNet-50, float32, without gradients. Sizes change at 300 queries, queries at 400x533
pixels. The theory is the number of multiply-adds (`hf-querydet info`): where time grows faster than
it, the machine runs less well on more; where it grows more slowly, small shapes waste it.
"""

import argparse
import json
import shlex
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import alternate, describe_machine

from hf_querydet import VARIANTS, variant_of
from hf_querydet.configuration_utils import DetectorConfig
from hf_querydet.model_info import model_info

SIZES = [(200, 266), (400, 533), (800, 1066)]
NUMBERS_OF_QUERIES = [100, 300, 900]
MIDDLE = 1


def build_config(variant: str, num_queries: int) -> DetectorConfig:
    fields: dict[str, Any] = {"num_queries": num_queries}
    if variant == "anchor_detr":
        fields = {"num_query_positions": num_queries, "num_query_patterns": 1}
    return VARIANTS[variant].config(
        backbone="resnet50", backbone_norm="frozen", frozen_backbone_stages=2, **fields
    )


@torch.no_grad()
def measure(
    cases: dict[str, tuple[DetectorConfig, tuple[int, int]]], rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds and multiply-adds of each case."""
    runs = {}
    for name, (config, size) in cases.items():
        model = variant_of(config).detector(config).eval()
        runs[name] = partial(model, torch.randn(1, 3, *size))
        runs[name]()
    times = alternate(runs, rounds)
    return {
        name: {
            "seconds": statistics.median(times[name]),
            "giga_multiply_adds": model_info(config, size=size).multiply_adds / 1e9,
        }
        for name, (config, size) in cases.items()
    }


def print_growth(title: str, results: dict[str, dict[str, float]]) -> None:
    first = next(iter(results.values()))
    for name, result in results.items():
        time, work = (result[key] / first[key] for key in first)
        print(
            f"{title:28} {name:>10} {1e3 * result['seconds']:9.0f} ms "
            f"{result['giga_multiply_adds']:8.1f} G   time x {time:5.2f}   theory x {work:5.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="kept in the json: what else the machine did")
    parser.add_argument("--output", type=Path, help="json with all numbers")
    options = parser.parse_args()

    report = {
        "command": shlex.join(["python", *sys.argv]),
        **describe_machine(options.note),
        "rounds": options.rounds,
        "variants": {},
    }
    for variant in options.variants:
        middle = build_config(variant, NUMBERS_OF_QUERIES[MIDDLE])
        by_size = {f"{height}x{width}": (middle, (height, width)) for height, width in SIZES}
        by_queries = {
            str(number): (build_config(variant, number), SIZES[MIDDLE])
            for number in NUMBERS_OF_QUERIES
        }
        results = {
            "pixels": measure(by_size, options.rounds),
            "queries": measure(by_queries, options.rounds),
        }
        for axis, result in results.items():
            print_growth(f"{variant}, {axis}", result)
        report["variants"][variant] = results
        if options.output:  # after every variant: a stopped run keeps what it has
            options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
