"""Time and memory of implementations that take turns, for the scripts beside this file."""

import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_per_call(run: Callable[[], object], device: str, calls: int) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def peak_extra_bytes(run: Callable[[], object], device: str) -> int:
    """Memory at the worst moment of a call, beyond its inputs and its results."""
    results = run()
    results = [results] if isinstance(results, Tensor) else results
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
                pairs = zip(times[other], times[name], strict=True)
                ratio = statistics.median(theirs / ours for theirs, ours in pairs)
                results[name][f"times_faster_than_{other}"] = ratio
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


def processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
