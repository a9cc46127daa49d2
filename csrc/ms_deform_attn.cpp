// Input checks shared by the CPU and the CUDA kernels.

#include "ms_deform_attn.h"

#include <limits>
#include <sstream>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace hf_querydet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    text << (dim ? ", " : "") << tensor.size(dim);
  }
  text << ')';
  return text.str();
}

bool has_shape(const Tensor& tensor, const std::vector<int64_t>& shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) {
    return false;
  }
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) != shape[dim]) {
      return false;
    }
  }
  return true;
}

// Keeps outer strides as they are: the kernels read them, a copy is needed only inside.
Tensor with_dense_inner_dims(const Tensor& tensor, int64_t num_inner_dims) {
  int64_t expected_stride = 1;
  for (int64_t dim = tensor.dim() - 1; dim >= tensor.dim() - num_inner_dims; --dim) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected_stride) {
      return torch::stable::contiguous(tensor);
    }
    expected_stride *= tensor.size(dim);
  }
  return tensor;
}

bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
      dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

bool on_same_device(const Tensor& tensor, const Tensor& other) {
  return tensor.is_cpu() == other.is_cpu() &&
      (tensor.is_cpu() || tensor.get_device_index() == other.get_device_index());
}

std::vector<Level> check_levels(const std::vector<int64_t>& spatial_shapes, int64_t num_tokens) {
  STD_TORCH_CHECK(!spatial_shapes.empty() && spatial_shapes.size() % 2 == 0,
                  "spatial_shapes must hold a height and a width for every level, got ",
                  spatial_shapes.size(), " numbers");
  // Cells of a level are numbered in 32 bits on the CPU; see cpu/ms_deform_attn_cpu.cpp.
  constexpr int64_t max_cells = std::numeric_limits<int32_t>::max() / 4;
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t i = 0; i < spatial_shapes.size(); i += 2) {
    const int64_t height = spatial_shapes[i];
    const int64_t width = spatial_shapes[i + 1];
    STD_TORCH_CHECK(height > 0 && width > 0 && height <= max_cells / (width + 3),
                    "spatial_shapes must be positive, with fewer than 2^29 cells in a level, "
                    "got level ", i / 2, " of (", height, ", ", width, ")");
    levels.push_back({height, width, start});
    start += height * width;
  }
  STD_TORCH_CHECK(start == num_tokens, "value has ", num_tokens,
                  " tokens but the levels of spatial_shapes have ", start, " cells");
  return levels;
}

} // namespace

Inputs check_inputs(const Tensor& value, const std::vector<int64_t>& spatial_shapes,
                    const Tensor& sampling_locations, const Tensor& attention_weights) {
  STD_TORCH_CHECK(value.dim() == 4,
                  "value must have shape (batch, num_tokens, num_heads, head_size), got ",
                  shape_of(value));
  STD_TORCH_CHECK(sampling_locations.dim() == 6,
                  "sampling_locations must have shape (batch, num_queries, num_heads, "
                  "num_levels, num_points, 2), got ", shape_of(sampling_locations));
  STD_TORCH_CHECK(is_supported(value.scalar_type()),
                  "value must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(
      sampling_locations.scalar_type() == value.scalar_type() ||
          (sampling_locations.scalar_type() == ScalarType::Float &&
           value.scalar_type() != ScalarType::Double),
      "sampling_locations must have the dtype of value, or float32 where value is a half type");
  STD_TORCH_CHECK(attention_weights.scalar_type() == sampling_locations.scalar_type(),
                  "attention_weights must have the dtype of sampling_locations");
  STD_TORCH_CHECK(
      on_same_device(sampling_locations, value) && on_same_device(attention_weights, value),
      "value, sampling_locations and attention_weights must be on one device");

  Inputs inputs;
  inputs.batch = value.size(0);
  inputs.num_tokens = value.size(1);
  inputs.num_heads = value.size(2);
  inputs.head_size = value.size(3);
  inputs.levels = check_levels(spatial_shapes, inputs.num_tokens);
  inputs.num_queries = sampling_locations.size(1);
  inputs.num_levels = static_cast<int64_t>(inputs.levels.size());
  inputs.num_points = sampling_locations.size(4);
  STD_TORCH_CHECK(
      has_shape(sampling_locations, {inputs.batch, inputs.num_queries, inputs.num_heads,
                                     inputs.num_levels, inputs.num_points, 2}),
      "sampling_locations must have shape (batch, num_queries, num_heads, num_levels, "
      "num_points, 2) with batch ", inputs.batch, ", num_heads ", inputs.num_heads,
      " and num_levels ", inputs.num_levels, ", got ", shape_of(sampling_locations));
  STD_TORCH_CHECK(
      has_shape(attention_weights, {inputs.batch, inputs.num_queries, inputs.num_heads,
                                    inputs.num_levels, inputs.num_points}),
      "attention_weights must have the shape of sampling_locations without its last "
      "dimension, got ", shape_of(attention_weights), " and ", shape_of(sampling_locations));

  inputs.value = with_dense_inner_dims(value, 1);
  inputs.sampling_locations = with_dense_inner_dims(sampling_locations, 3);
  inputs.attention_weights = with_dense_inner_dims(attention_weights, 2);
  return inputs;
}

Tensor check_grad_output(const Tensor& grad_output, const Inputs& inputs) {
  STD_TORCH_CHECK(
      has_shape(grad_output, {inputs.batch, inputs.num_queries,
                              inputs.num_heads * inputs.head_size}),
      "grad_output must have shape (batch, num_queries, num_heads * head_size), got ",
      shape_of(grad_output));
  STD_TORCH_CHECK(grad_output.scalar_type() == inputs.value.scalar_type() &&
                      on_same_device(grad_output, inputs.value),
                  "grad_output must have the dtype and the device of value");
  return with_dense_inner_dims(grad_output, 1);
}

} // namespace hf_querydet
