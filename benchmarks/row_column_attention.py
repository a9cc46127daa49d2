"""Time and memory of Anchor DETR's row-column attention beside full attention.

    python benchmarks/row_column_attention.py [--device cuda] [--rounds 7] [--output FILE.json]

The map of a DC5 backbone under an 800x1066 picture, 50x67 cells of 256 channels, 8 heads. Encoder:
every cell is a query. Decoder: 900 queries. Layers with their projections, gradients of queries and
features.

`full (eager)` holds a weight for every pair of query and cell; it is what the paper compares with.
`full (sdpa)` is PyTorch's fused kernel, which does not hold them either and came after the paper.

All implementations take turns within each round, so that what else the machine does meets all of
them. Memory is the worst moment of a call beyond its inputs and results.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import describe_machine, measure_case, print_case
from torch import Tensor
from transformers import PreTrainedConfig

from hf_querydet.layers.attention import MultiHeadAttention
from hf_querydet.models.anchor_detr.row_column_attention import RowColumnAttention

HEIGHT, WIDTH = 50, 67
HIDDEN_SIZE, NUM_HEADS = 256, 8
NUM_QUERIES = {"encoder": HEIGHT * WIDTH, "decoder": 900}
BASELINES = ("full (eager)", "full (sdpa)")


def implementations(device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Functions of queries (batch, num_queries, channels) and features (batch, h, w, channels)."""
    generator = torch.Generator().manual_seed(0)
    row_positions = torch.randn(1, WIDTH, HIDDEN_SIZE, generator=generator).to(device)
    column_positions = torch.randn(1, HEIGHT, HIDDEN_SIZE, generator=generator).to(device)
    cell_positions = row_positions[:, None] + column_positions[:, :, None]
    row_column = RowColumnAttention(
        hidden_size=HIDDEN_SIZE, num_heads=NUM_HEADS, dropout=0.0, average_valid_keys=False
    ).to(device)

    def run_row_column(queries: Tensor, features: Tensor) -> Tensor:
        return row_column(queries, queries, features, row_positions, column_positions)[0]

    def full(implementation: str) -> Callable[[Tensor, Tensor], Tensor]:
        attention = MultiHeadAttention(
            PreTrainedConfig(attn_implementation=implementation),
            hidden_size=HIDDEN_SIZE,
            num_heads=NUM_HEADS,
            dropout=0.0,
        ).to(device)

        def run(queries: Tensor, features: Tensor) -> Tensor:
            keys = (features + cell_positions).flatten(1, 2)
            return attention(queries, keys, features.flatten(1, 2))[0]

        return run

    return {
        "row-column": run_row_column,
        "full (eager)": full("eager"),
        "full (sdpa)": full("sdpa"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=list(NUM_QUERIES), choices=list(NUM_QUERIES))
    parser.add_argument("--note", default="", help="kept in the json: what else the machine did")
    parser.add_argument("--output", type=Path, help="json with all numbers")
    options = parser.parse_args()

    runs = implementations(options.device)
    report = {
        "command": shlex.join(["python", *sys.argv]),
        **describe_machine(options.note, options.device),
        "cases": [],
    }
    print(f"{report['processor']}, {report['threads']} threads, torch {torch.__version__}")
    for shape in options.shapes:
        for batch_size in options.batch_sizes:
            generator = torch.Generator().manual_seed(0)
            sizes = [(NUM_QUERIES[shape],), (HEIGHT, WIDTH)]
            inputs = [
                torch.randn(batch_size, *size, HIDDEN_SIZE, generator=generator).to(options.device)
                for size in sizes
            ]
            for direction in ("forward", "forward+backward"):
                results = measure_case(
                    runs,
                    inputs,
                    None if direction == "forward" else torch.ones_like(inputs[0]),
                    device=options.device,
                    rounds=options.rounds,
                    baselines=BASELINES,
                )
                memory = {name: result["peak_extra_mb"] for name, result in results.items()}
                case = {
                    "shape": shape,
                    "batch_size": batch_size,
                    "direction": direction,
                    "results": results,
                    "share_of_memory": {
                        name: memory["row-column"] / memory[name] for name in BASELINES
                    },
                }
                report["cases"].append(case)
                if options.output:  # after every case: a stopped run keeps what it has
                    options.output.write_text(json.dumps(report, indent=2) + "\n")
                print_case(f"{shape}, batch {batch_size}, {direction}", results)
                shares = ", ".join(
                    f"{share:.0%} of {name}" for name, share in case["share_of_memory"].items()
                )
                print(f"  row-column needs {shares} memory")


if __name__ == "__main__":
    main()
