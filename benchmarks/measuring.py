"""Time, memory, what a measured number depends on, and tables of such numbers."""

import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor


def processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def describe_machine(note: str = "", device: str = "cpu") -> dict[str, Any]:
    """Hardware and versions for the head of a report; `note` says what else the machine did."""
    on_cpu = device == "cpu"
    return {
        "note": note,
        "processor": processor_name() if on_cpu else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "other_load_at_start": Path("/proc/loadavg").read_text().split()[0],
    }


def photographs(number: int, height: int, width: int) -> list[Image.Image]:
    """Smooth noise, as PIL pictures."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (number, 12, 16, 3), dtype=np.uint8)
    return [Image.fromarray(values).resize((width, height), Image.BICUBIC) for values in noise]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_per_call(run: Callable[[], object], device: str = "cpu", calls: int = 1) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def alternate(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each run in each round; they take turns, so that other load meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds_per_call(run, device))
    return times


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times faster ours are: the median over rounds."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def peak_extra_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """Memory at the worst moment of a call, beyond its inputs and the tensors it returns."""
    results = run()
    results = [results] if isinstance(results, Tensor) else results or []
    result_bytes = sum(result.nbytes for result in results)
    del results
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - result_bytes
    # Give freed memory back, so that it cannot be reused unseen; then let Linux forget the peak.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before - result_bytes)


def available_bytes() -> int:
    """Memory that the machine could still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def measure_case(
    runs: dict[str, Callable],
    inputs: list[Tensor],
    grad: Tensor | None,
    *,
    device: str,
    rounds: int,
    baselines: Sequence[str],
) -> dict[str, dict]:
    """Times and memory of each implementation that can run this case.

    Args:
        runs: Implementations by name, functions of the inputs.
        inputs: Tensors.
        grad: Gradient of the output; None measures the forward alone, without autograd.
        device: Of the inputs.
        rounds: In each of them all implementations take their turn.
        baselines: Implementations that the others are compared with, round by round.
    """
    calls_of, results = {}, {}
    for name, function in runs.items():

        def call(function=function):
            if grad is None:
                with torch.no_grad():
                    return function(*inputs)
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            return torch.autograd.grad(function(*leaves), leaves, grad)

        try:
            call()
        except (RuntimeError, NotImplementedError) as error:
            results[name] = {"error": str(error).splitlines()[0]}
            continue
        once = seconds_per_call(call, device, 1)
        calls_of[name] = (call, max(1, min(50, int(0.05 / once))))
    times = {name: [] for name in calls_of}
    for _ in range(rounds):
        for name, (call, calls) in calls_of.items():
            times[name].append(seconds_per_call(call, device, calls))
    for name, (call, _) in calls_of.items():
        results[name] = {
            "median_ms": 1e3 * statistics.median(times[name]),
            "min_ms": 1e3 * min(times[name]),
            "peak_extra_mb": peak_extra_bytes(call, device) / 1e6,
        }
        for other in baselines:
            if other in times and other != name:
                results[name][f"times_faster_than_{other}"] = median_ratio(
                    times[other], times[name]
                )
    return results


def print_case(title: str, results: dict[str, dict]) -> None:
    print(f"\n{title}")
    for name, result in results.items():
        if "error" in result:
            print(f"  {name:24} cannot: {result['error'][:90]}")
            continue
        ratios = "  ".join(
            f"{value:6.1f} x {key.rpartition('_')[2]}"
            for key, value in result.items()
            if key.startswith("times")
        )
        print(
            f"  {name:24} median {result['median_ms']:9.2f} ms   min {result['min_ms']:9.2f} ms   "
            f"memory {result['peak_extra_mb']:8.1f} MB   {ratios}"
        )
    sys.stdout.flush()


def markdown_table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
