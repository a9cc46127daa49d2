// Multi-scale deformable attention: the contract of all implementations.
//
// Deformable DETR (arXiv:2010.04159), Sec. 4.1, Eq. 3, without the linear projections around it.
//
// Letters:  B batch, S tokens of all levels, M heads, D channels of a head,
//           Q queries, L levels, P points per level.
//
//   value               (B, S, M, D)        T
//   spatial_shapes      2 * L integers      height and width of every level, in cells
//   sampling_locations  (B, Q, M, L, P, 2)  R, (x, y), 0 to 1 across the level
//   attention_weights   (B, Q, M, L, P)     R
//   output              (B, Q, M * D)       T
//
//   output[b, q, m, :] = sum over l, p of attention_weights[b, q, m, l, p]
//                        * bilinear(level l of value[b, :, m, :], sampling_locations[b, q, m, l, p])
//
// A location (x, y) lies at column x * width - 0.5 and row y * height - 0.5 of its level, so that
// integers are cell centres (align_corners=False). Cells outside the level are zero. A point takes
// part only while -1 < column < width and -1 < row < height. Every other point, NaN and infinity
// among them, adds nothing to the output and has zero gradient.
//
// T is float, double, BFloat16 or Half; R is T, or float. Arithmetic and all sums are in float, in
// double where T is double, and rounded to T once.
//
// Tokens of a level are row-major and levels follow one another. Any batch, query and head strides
// are read in place; check_inputs makes copies only where the innermost dimensions are not dense.
//
// The operator's schema is written in Python (hf_querydet/ops/deformable_attention_op.py), because
// exported programs that name the operator must load before anything has been compiled. The files
// here register kernels for it.

#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

namespace hf_querydet {

struct Level {
  int64_t height;
  int64_t width;
  int64_t start; // first token
};

struct Inputs {
  torch::stable::Tensor value;              // stride 1 over D
  torch::stable::Tensor sampling_locations; // dense over (L, P, 2)
  torch::stable::Tensor attention_weights;  // dense over (L, P)
  std::vector<Level> levels;
  int64_t batch, num_tokens, num_heads, head_size, num_queries, num_levels, num_points;
};

// Raises an error that names the argument unless the tensors fit the contract.
Inputs check_inputs(const torch::stable::Tensor& value,
                    const std::vector<int64_t>& spatial_shapes,
                    const torch::stable::Tensor& sampling_locations,
                    const torch::stable::Tensor& attention_weights);

// The same for the gradient of the output; returns it with stride 1 over its last dimension.
torch::stable::Tensor check_grad_output(const torch::stable::Tensor& grad_output,
                                        const Inputs& inputs);

// Calls run(T{}, R{}) with the types of `value` and of the sampling tensors.
template <typename Run>
void with_types(const Inputs& inputs, const Run& run) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  using torch::headeronly::ScalarType;
  const bool float_sampling = inputs.sampling_locations.scalar_type() == ScalarType::Float;
  switch (inputs.value.scalar_type()) {
    case ScalarType::Double: return run(double{}, double{});
    case ScalarType::Float: return run(float{}, float{});
    case ScalarType::BFloat16:
      return float_sampling ? run(BFloat16{}, float{}) : run(BFloat16{}, BFloat16{});
    case ScalarType::Half: return float_sampling ? run(Half{}, float{}) : run(Half{}, Half{});
    default: STD_TORCH_CHECK(false, "unreachable: check_inputs lists the dtypes");
  }
}

} // namespace hf_querydet
