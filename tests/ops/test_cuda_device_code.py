"""The CUDA kernels' device code, run on the CPU by an emulator of shuffles and atomics."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from msda_oracle import loop_oracle, random_inputs

LEVELS = [(5, 7), (3, 4), (1, 1)]


@pytest.fixture(scope="module", params=["", "-D__CUDA_ARCH__=900"], ids=["sm_80", "sm_90"])
def emulator(request, tmp_path_factory):
    """The kernels as compiled for chips without and with vector atomics; out of bounds is fatal."""
    library = tmp_path_factory.mktemp("emulator") / "emulator.so"
    source = Path(__file__).with_name("cuda_emulator.cpp")
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", *request.param.split()]
    subprocess.run(["c++", *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def run(function, value, level_shapes, locations, weights, grad_output):
    batch, num_tokens, num_heads, head_size = value.shape
    num_queries, num_levels, num_points = locations.shape[1], *locations.shape[3:5]
    sizes = [batch, num_tokens, num_heads, head_size, num_queries, num_levels, num_points]
    flat = [size for level in level_shapes for size in level]
    sum_type = torch.promote_types(value.dtype, torch.float32)
    # NaN where the kernel must write, zero where it adds.
    results = [
        torch.full((batch, num_queries, num_heads * head_size), float("nan"), dtype=value.dtype),
        torch.zeros(value.shape, dtype=sum_type),
        torch.full(locations.shape, float("nan"), dtype=sum_type),
        torch.full(weights.shape, float("nan"), dtype=sum_type),
    ]
    tensors = [grad_output, value, locations, weights, *results]
    function(
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_int64 * len(flat))(*flat),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
    )
    return results


@pytest.mark.parametrize(
    ("name", "dtype", "head_size", "tolerance"),
    [
        ("run_double_2", torch.float64, 20, 1e-12),  # 10 threads of a group of 16 have channels
        ("run_double_2", torch.float64, 70, 1e-12),  # more channels than a warp takes at once
        ("run_double_1", torch.float64, 33, 1e-12),
        ("run_double_1", torch.float64, 1, 1e-12),
        ("run_float_4", torch.float32, 32, 1e-5),
        ("run_half_8", torch.float16, 16, 2e-3),  # 11 bits in the result
    ],
)
def test_device_code_equals_the_loop(name, dtype, head_size, tolerance, emulator):
    # 11 queries: the last block has rows to spare.
    value, locations, weights = random_inputs(LEVELS, num_queries=11, head_size=head_size)
    locations[0, 0] = float("nan")
    locations[0, 1] = float("inf")
    locations[0, 2] = -1e30
    sum_type = torch.promote_types(dtype, torch.float32)
    value, locations, weights = value.to(dtype), locations.to(sum_type), weights.to(sum_type)
    grad_output = (torch.rand(2, 11, 3 * head_size, dtype=torch.float64) - 0.5).to(dtype)

    results = run(getattr(emulator, name), value, LEVELS, locations, weights, grad_output)

    expected = loop_oracle(value, LEVELS, locations, weights, grad_output)
    for result, oracle in zip(results, expected, strict=True):
        torch.testing.assert_close(result.double(), oracle, rtol=tolerance, atol=tolerance)
