"""Time and memory of multi-scale deformable attention.

    python benchmarks/ms_deform_attn.py [--device cuda] [--rounds 7] [--output FILE.json]

--shapes and --dtypes choose fewer cases.

Encoder shape: an 800x1066 picture, levels 100x134, 50x67, 25x34 and 13x17, every token a query.
Decoder shape: 300 queries on the same levels. 8 heads of 32 channels, 4 points per level. Random
locations lie anywhere in the picture; near ones lie as after the first steps of training: the
initial ring around the reference, plus noise of one cell.

All implementations take turns within each round, so that what else the machine does meets all of
them. A ratio is the median over rounds of (time of transformers / time of ours).

On a GPU, `authors` is the authors' algorithm (ms_deform_attn_baseline.cu), which has no half types.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import describe_machine, measure_case, print_case, seconds_per_call
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import (
    MultiScaleDeformableAttention,
)

from hf_querydet.ops import extension, ms_deform_attn
from hf_querydet.ops.ms_deform_attn_reference import ms_deform_attn_reference

LEVELS = [(100, 134), (50, 67), (25, 34), (13, 17)]
NUM_TOKENS = sum(height * width for height, width in LEVELS)
NUM_HEADS, HEAD_SIZE, NUM_POINTS = 8, 32, 4
SHAPES = {"encoder": NUM_TOKENS, "decoder": 300}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CORNERS = 4


def make_inputs(shape: str, places: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_queries = SHAPES[shape]
    samples = (1, num_queries, NUM_HEADS, len(LEVELS), NUM_POINTS)
    value = torch.randn(1, NUM_TOKENS, NUM_HEADS, HEAD_SIZE, generator=generator)
    weights = torch.randn(*samples[:3], len(LEVELS) * NUM_POINTS, generator=generator)
    weights = weights.softmax(-1).view(samples)
    if places == "random":
        locations = torch.rand(*samples, 2, generator=generator)
    else:
        if shape == "encoder":
            grids = [
                torch.cartesian_prod(
                    (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
                ).flip(-1)
                for height, width in LEVELS
            ]
            references = torch.cat(grids)
        else:
            references = torch.rand(num_queries, 2, generator=generator)
        angles = torch.arange(NUM_HEADS) * (2 * math.pi / NUM_HEADS)
        ring = torch.stack([angles.cos(), angles.sin()], -1)
        ring = ring / ring.abs().amax(-1, keepdim=True)
        offsets = ring[:, None, None] * torch.arange(1, NUM_POINTS + 1).view(-1, 1)
        offsets = offsets + torch.randn(*samples, 2, generator=generator)
        sizes = torch.tensor([[width, height] for height, width in LEVELS]).view(-1, 1, 2)
        locations = references.view(1, -1, 1, 1, 1, 2) + offsets / sizes
    return [tensor.to(device, dtype).contiguous() for tensor in (value, locations, weights)]


# ---- implementations -----------------------------------------------------------------------------


class AuthorsAlgorithm(torch.autograd.Function):
    """The baseline kernel, forward and backward."""

    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights):
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return torch.ops.hf_querydet_baseline.forward(value, shapes, starts, locations, weights)

    @staticmethod
    def backward(ctx, grad_output):
        grads = torch.ops.hf_querydet_baseline.backward(
            grad_output.contiguous(), *ctx.saved_tensors
        )
        return grads[0], None, None, *grads[1:]


def implementations(device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    if not extension.load(device):
        sys.exit(f"no kernels for {device}: {extension.state_of(device).reason}")
    module = MultiScaleDeformableAttention()

    def plain(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_reference(value, LEVELS, locations, weights)

    runs = {
        "compiled": lambda *inputs: ms_deform_attn(inputs[0], LEVELS, *inputs[1:]),
        "transformers": lambda *inputs: module(inputs[0], None, LEVELS, None, *inputs[1:], 64),
        "plain": plain,
    }
    if device == "cuda":
        from torch.utils import cpp_extension

        cpp_extension.load(
            name="ms_deform_attn_baseline",
            sources=[str(Path(__file__).with_name("ms_deform_attn_baseline.cu"))],
            extra_cuda_cflags=extension.compiler_flags("cuda"),
            is_python_module=False,
        )
        shapes = torch.tensor(LEVELS, device=device)
        starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
        runs["authors"] = lambda *inputs: AuthorsAlgorithm.apply(
            inputs[0], shapes, starts, *inputs[1:]
        )
        runs["torch.compile of plain"] = torch.compile(plain)
    return runs


# ---- measuring -----------------------------------------------------------------------------------


def read_bandwidth(num_bytes: int, device: str) -> float:
    """Bytes per second of adding up an array again and again; on the CPU one array per thread."""
    array = torch.ones(num_bytes // 4, device=device)
    calls = max(1, 200_000_000 // num_bytes)
    # One thread, times their number: the start of a parallel region would count otherwise.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = min(seconds_per_call(array.sum, device, calls) for _ in range(7))
    torch.set_num_threads(threads)
    return num_bytes / best * (threads if device == "cpu" else 1)


def traffic(shape: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of a forward call: corners read through the caches, and what is touched at all."""
    samples = SHAPES[shape] * NUM_HEADS * len(LEVELS) * NUM_POINTS
    size = torch.empty(0, dtype=dtype).element_size()
    corners = samples * CORNERS * HEAD_SIZE
    value = min(corners, NUM_TOKENS * NUM_HEADS * HEAD_SIZE)
    arrays = value + SHAPES[shape] * NUM_HEADS * HEAD_SIZE + 3 * samples
    return {"corners": corners * size, "arrays": arrays * size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--note", default="", help="kept in the json: what else the machine did")
    parser.add_argument("--output", type=Path, help="json with all numbers")
    options = parser.parse_args()

    runs = implementations(options.device)
    on_cpu = options.device == "cpu"
    report = {
        "command": shlex.join(["python", *sys.argv]),
        **describe_machine(options.note, options.device),
        "flags": extension.compiler_flags(options.device),
        "cases": [],
    }
    report["memory_read_gb_per_s"] = read_bandwidth(2**30, options.device) / 1e9
    if on_cpu:  # a GPU adds up an array of this size in less time than a launch takes
        # A (batch, head) has a map of its own, which a thread reads again and again.
        map_bytes = NUM_TOKENS * HEAD_SIZE * 4
        report["cache_read_gb_per_s"] = read_bandwidth(map_bytes, options.device) / 1e9
    for name in ("processor", "threads", "torch", "cache_read_gb_per_s", "memory_read_gb_per_s"):
        if name in report:
            print(f"{name}: {report[name]}")
    for shape in options.shapes:
        for places in ("near", "random"):
            for dtype in options.dtypes:
                # A function is compiled for few kinds of input and silently runs eager after those.
                torch.compiler.reset()
                inputs = make_inputs(shape, places, DTYPES[dtype], options.device)
                grad = torch.ones(1, SHAPES[shape], NUM_HEADS * HEAD_SIZE).to(inputs[0])
                for direction in ("forward", "forward+backward"):
                    results = measure_case(
                        {
                            name: run
                            for name, run in runs.items()
                            if name != "authors" or dtype == "float32"
                        },
                        inputs,
                        None if direction == "forward" else grad,
                        device=options.device,
                        rounds=options.rounds,
                        baselines=("transformers", "authors"),
                    )
                    case = {
                        "shape": shape,
                        "locations": places,
                        "dtype": dtype,
                        "direction": direction,
                        "results": results,
                    }
                    if direction == "forward":
                        moved = traffic(shape, DTYPES[dtype])
                        seconds = results["compiled"]["min_ms"] / 1e3
                        case["bytes"] = moved
                        case["share_of_memory_read"] = (
                            moved["arrays"] / seconds / 1e9 / report["memory_read_gb_per_s"]
                        )
                        if on_cpu:
                            case["share_of_cache_read"] = (
                                moved["corners"] / seconds / 1e9 / report["cache_read_gb_per_s"]
                            )
                    report["cases"].append(case)
                    if options.output:  # after every case: a stopped run keeps what it has
                        options.output.write_text(json.dumps(report, indent=2) + "\n")
                    print_case(f"{shape}, {places} locations, {dtype}, {direction}", results)
                    for share, read in (("cache", "corners"), ("memory", "arrays")):
                        if f"share_of_{share}_read" in case:
                            print(
                                f"  compiled reads {moved[read] / 1e6:.0f} MB of {read} at "
                                f"{case[f'share_of_{share}_read']:.0%} of {share} bandwidth"
                            )


if __name__ == "__main__":
    main()
