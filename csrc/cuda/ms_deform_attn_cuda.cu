// Launches the CUDA kernels of multi-scale deformable attention. Contract: ../ms_deform_attn.h.
//
// The value gradient is added up by atomics, so that its last bits differ from run to run; for
// half types in a float copy, rounded once at the end.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "../ms_deform_attn.h"
#include "ms_deform_attn_kernels.cuh"

namespace hf_querydet::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0,
                  "cannot read the current CUDA stream of device ", device_index);
  return static_cast<cudaStream_t>(stream);
}

Shape shape_of(const Inputs& in) {
  STD_TORCH_CHECK(in.num_levels <= kMaxLevels, "spatial_shapes has ", in.num_levels,
                  " levels; the CUDA kernels take at most ", kMaxLevels);
  STD_TORCH_CHECK(std::max({in.num_tokens, in.num_queries, in.num_heads, in.head_size,
                            in.num_levels * in.num_points}) <= std::numeric_limits<int>::max() / 2,
                  "value and sampling_locations must have fewer than 2^30 tokens, queries, heads, "
                  "channels and points");
  Shape shape = {};
  shape.num_rows = in.batch * in.num_queries * in.num_heads;
  shape.num_queries = static_cast<int>(in.num_queries);
  shape.num_heads = static_cast<int>(in.num_heads);
  shape.head_size = static_cast<int>(in.head_size);
  shape.num_levels = static_cast<int>(in.num_levels);
  shape.num_points = static_cast<int>(in.num_points);
  for (int64_t level = 0; level < in.num_levels; ++level) {
    shape.height[level] = static_cast<int>(in.levels[level].height);
    shape.width[level] = static_cast<int>(in.levels[level].width);
    shape.start[level] = static_cast<int>(in.levels[level].start);
  }
  for (int dim = 0; dim < 3; ++dim) {
    shape.value_stride[dim] = in.value.stride(dim);
    shape.locations_stride[dim] = in.sampling_locations.stride(dim);
    shape.weights_stride[dim] = in.attention_weights.stride(dim);
  }
  return shape;
}

// Whether every head of every token starts at a multiple of the vector.
template <typename T>
bool is_aligned(const Tensor& tensor, int num_outer_dims, int64_t head_size) {
  constexpr int64_t vector = kVectorBytes / sizeof(T);
  bool aligned = head_size % vector == 0 &&
      reinterpret_cast<uintptr_t>(tensor.const_data_ptr<T>()) % kVectorBytes == 0;
  for (int dim = 0; dim < num_outer_dims; ++dim) {
    aligned = aligned && (tensor.size(dim) == 1 || tensor.stride(dim) % vector == 0);
  }
  return aligned;
}

// Threads of a row: enough for all channels, a power of two within a warp.
int group_size(int64_t head_size, int64_t vector) {
  int group = 1;
  while (group < kWarpSize && group * vector < head_size) {
    group *= 2;
  }
  return group;
}

unsigned num_blocks(const Shape& shape) {
  const int64_t rows_per_block = kThreadsPerBlock / shape.group;
  const int64_t blocks = (shape.num_rows + rows_per_block - 1) / rows_per_block;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(),
                  "sampling_locations has too many queries for one launch: ", shape.num_rows,
                  " of them over all batches and heads");
  return static_cast<unsigned>(blocks);
}

// Calls run with the number of channels that a thread loads at once.
template <typename T, typename Run>
void with_vector(bool aligned, const Run& run) {
  if (aligned) {
    run(std::integral_constant<int, kVectorBytes / sizeof(T)>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

template <typename T, typename R>
void launch_forward(const Inputs& in, Tensor& output, cudaStream_t stream) {
  Shape shape = shape_of(in);
  with_vector<T>(is_aligned<T>(in.value, 3, in.head_size), [&](auto vector) {
    shape.group = group_size(in.head_size, vector.value);
    forward_kernel<T, R, vector.value><<<num_blocks(shape), kThreadsPerBlock, 0, stream>>>(
        shape, in.value.const_data_ptr<T>(), in.sampling_locations.const_data_ptr<R>(),
        in.attention_weights.const_data_ptr<R>(), output.mutable_data_ptr<T>());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, typename R>
void launch_backward(const Inputs& in, const Tensor& grad_output, Tensor& grad_value,
                     Tensor& grad_locations, Tensor& grad_weights, cudaStream_t stream) {
  Shape shape = shape_of(in);
  shape.grad_stride[0] = grad_output.stride(0);
  shape.grad_stride[1] = grad_output.stride(1);
  const bool aligned = is_aligned<T>(in.value, 3, in.head_size) &&
      is_aligned<T>(grad_output, 2, in.head_size);
  with_vector<T>(aligned, [&](auto vector) {
    shape.group = group_size(in.head_size, vector.value);
    backward_kernel<T, R, vector.value><<<num_blocks(shape), kThreadsPerBlock, 0, stream>>>(
        shape, grad_output.const_data_ptr<T>(), in.value.const_data_ptr<T>(),
        in.sampling_locations.const_data_ptr<R>(), in.attention_weights.const_data_ptr<R>(),
        in.num_tokens, grad_value.mutable_data_ptr<Sum<T>>(),
        grad_locations.mutable_data_ptr<R>(), grad_weights.mutable_data_ptr<R>());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor forward(Tensor value, std::vector<int64_t> spatial_shapes, Tensor sampling_locations,
               Tensor attention_weights) {
  const Inputs in = check_inputs(value, spatial_shapes, sampling_locations, attention_weights);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const std::vector<int64_t> shape = {in.batch, in.num_queries, in.num_heads * in.head_size};
  if (in.attention_weights.numel() == 0) {
    return torch::stable::new_zeros(value, shape);
  }
  Tensor output = torch::stable::new_empty(value, shape);
  if (output.numel() != 0) {
    with_types(in, [&](auto t, auto r) {
      launch_forward<decltype(t), decltype(r)>(in, output,
                                               current_stream(value.get_device_index()));
    });
  }
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_output, Tensor value,
                                            std::vector<int64_t> spatial_shapes,
                                            Tensor sampling_locations, Tensor attention_weights) {
  const Inputs in = check_inputs(value, spatial_shapes, sampling_locations, attention_weights);
  const Tensor grad = check_grad_output(grad_output, in);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const auto zeros_like = [](const Tensor& tensor, ScalarType dtype) {
    const auto sizes = tensor.sizes();
    return torch::stable::new_zeros(tensor, std::vector<int64_t>(sizes.begin(), sizes.end()),
                                    dtype);
  };
  const ScalarType sum_type =
      value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor grad_value = zeros_like(value, sum_type);
  Tensor grad_locations = zeros_like(sampling_locations, sampling_locations.scalar_type());
  Tensor grad_weights = zeros_like(attention_weights, attention_weights.scalar_type());
  if (grad.numel() != 0 && in.attention_weights.numel() != 0) {
    with_types(in, [&](auto t, auto r) {
      launch_backward<decltype(t), decltype(r)>(in, grad, grad_value, grad_locations, grad_weights,
                                                current_stream(value.get_device_index()));
    });
  }
  if (value.scalar_type() != sum_type) {
    grad_value = torch::stable::to(grad_value, value.scalar_type());
  }
  return {grad_value, grad_locations, grad_weights};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_querydet, CUDA, library) {
  library.impl("ms_deform_attn", TORCH_BOX(&forward));
  library.impl("ms_deform_attn_backward", TORCH_BOX(&backward));
}

} // namespace hf_querydet::cuda
