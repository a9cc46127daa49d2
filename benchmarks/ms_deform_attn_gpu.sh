#!/bin/sh
# Everything about the CUDA kernels that needs a GPU, in one command, from the repository's root:
# tests, memory checks, and the benchmark against the authors' algorithm.
# Needs nvcc and compute-sanitizer of a CUDA toolkit, and `pip install -e .[dev]`.
set -eu
cd "$(dirname "$0")/.."
python -c 'import torch; assert torch.cuda.is_available(), "no GPU"'
export HF_QUERYDET_KERNELS=require PYTHONPATH=.

python -m pytest tests/ops/test_ms_deform_attn.py -q -m cuda
for tool in memcheck racecheck initcheck; do
  # gradcheck and the 2^31 offsets take hours under these tools and touch no other code.
  compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
    python -m pytest tests/ops/test_ms_deform_attn.py -q -m cuda -x \
    -k "loop or rounding or nowhere or leak or contiguous or empty"
done
name=$(python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "_").lower())')
python benchmarks/ms_deform_attn.py --device cuda --rounds 15 \
  --output "benchmarks/results/ms_deform_attn_$name.json"
