// The yardstick on GPUs: multi-scale deformable attention as its authors' CUDA kernel computes it,
// written from the description of the algorithm. Not part of the library.
//
// Forward: one thread per output channel. Each thread reads the locations and weights of its
// (query, head) itself, and loads one number per corner.
// Backward: one block per (query, head), one thread per channel. Value gradients are added by one
// global atomic per corner and channel; the gradients of a location and a weight are gathered in
// shared memory, sample by sample, and added up by the block: by its first thread up to 32
// channels, in a tree above.
//
// float32 and float64 only, contiguous inputs, level sizes in device memory, as in the original.

#include <cstdint>
#include <tuple>
#include <vector>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace {

using torch::stable::Tensor;

struct Sizes {
  int batch, num_tokens, num_heads, head_size, num_queries, num_levels, num_points;
};

template <typename T>
__device__ T corner_value(const T* level_value, int height, int width, int row, int column,
                          int stride) {
  const bool inside = row >= 0 && column >= 0 && row < height && column < width;
  return inside ? level_value[(row * width + column) * stride] : T(0);
}

template <typename T>
__global__ void baseline_forward(Sizes sizes, const T* value, const int64_t* shapes,
                                 const int64_t* starts, const T* locations, const T* weights,
                                 T* output) {
  const int total = sizes.batch * sizes.num_queries * sizes.num_heads * sizes.head_size;
  for (int index = blockIdx.x * blockDim.x + threadIdx.x; index < total;
       index += blockDim.x * gridDim.x) {
    const int channel = index % sizes.head_size;
    const int row_index = index / sizes.head_size;
    const int head = row_index % sizes.num_heads;
    const int batch = row_index / sizes.num_heads / sizes.num_queries;
    const int stride = sizes.num_heads * sizes.head_size;
    const T* batch_value = value + batch * sizes.num_tokens * stride;
    int sample = row_index * sizes.num_levels * sizes.num_points;
    T sum = 0;
    for (int level = 0; level < sizes.num_levels; ++level) {
      const int height = shapes[2 * level], width = shapes[2 * level + 1];
      const T* level_value =
          batch_value + starts[level] * stride + head * sizes.head_size + channel;
      for (int point = 0; point < sizes.num_points; ++point, ++sample) {
        const T x = locations[2 * sample] * width - T(0.5);
        const T y = locations[2 * sample + 1] * height - T(0.5);
        if (x > -1 && y > -1 && x < width && y < height) {
          const int column = floor(x), row = floor(y);
          const T fx = x - column, fy = y - row;
          const T v1 = corner_value(level_value, height, width, row, column, stride);
          const T v2 = corner_value(level_value, height, width, row, column + 1, stride);
          const T v3 = corner_value(level_value, height, width, row + 1, column, stride);
          const T v4 = corner_value(level_value, height, width, row + 1, column + 1, stride);
          sum += weights[sample] * ((1 - fy) * ((1 - fx) * v1 + fx * v2) +
                                    fy * ((1 - fx) * v3 + fx * v4));
        }
      }
    }
    output[index] = sum;
  }
}

template <typename T>
__device__ T block_sum(T* cache) {
  if (blockDim.x <= 32) {
    T sum = 0;
    if (threadIdx.x == 0) {
      for (unsigned i = 0; i < blockDim.x; ++i) {
        sum += cache[i];
      }
    }
    return sum;
  }
  for (unsigned active = blockDim.x; active > 1;) {
    const unsigned half = (active + 1) / 2;
    if (threadIdx.x + half < active) {
      cache[threadIdx.x] += cache[threadIdx.x + half];
    }
    active = half;
    __syncthreads();
  }
  return cache[0];
}

template <typename T>
__global__ void baseline_backward(Sizes sizes, const T* grad_output, const T* value,
                                  const int64_t* shapes, const int64_t* starts,
                                  const T* locations, const T* weights, T* grad_value,
                                  T* grad_locations, T* grad_weights) {
  extern __shared__ char memory[];
  T* cache_x = reinterpret_cast<T*>(memory);
  T* cache_y = cache_x + blockDim.x;
  T* cache_w = cache_y + blockDim.x;
  const int channel = threadIdx.x;
  const int row_index = blockIdx.x;
  const int head = row_index % sizes.num_heads;
  const int batch = row_index / sizes.num_heads / sizes.num_queries;
  const int stride = sizes.num_heads * sizes.head_size;
  const T grad = grad_output[row_index * sizes.head_size + channel];
  int sample = row_index * sizes.num_levels * sizes.num_points;
  for (int level = 0; level < sizes.num_levels; ++level) {
    const int height = shapes[2 * level], width = shapes[2 * level + 1];
    const int64_t offset = (int64_t{batch} * sizes.num_tokens + starts[level]) * stride +
        head * sizes.head_size + channel;
    for (int point = 0; point < sizes.num_points; ++point, ++sample) {
      const T x = locations[2 * sample] * width - T(0.5);
      const T y = locations[2 * sample + 1] * height - T(0.5);
      const T weight = weights[sample];
      T along_x = 0, along_y = 0, along_w = 0;
      if (x > -1 && y > -1 && x < width && y < height) {
        const int column = floor(x), row = floor(y);
        const T fx = x - column, fy = y - row;
        for (int corner = 0; corner < 4; ++corner) {
          const int right = corner & 1, below = corner >> 1;
          const int c = column + right, r = row + below;
          if (c >= 0 && r >= 0 && c < width && r < height) {
            const T share_x = right ? fx : 1 - fx, share_y = below ? fy : 1 - fy;
            const int64_t cell = offset + (r * width + c) * stride;
            const T product = grad * value[cell];
            atomicAdd(grad_value + cell, grad * weight * share_x * share_y);
            along_w += share_x * share_y * product;
            along_x += (right ? share_y : -share_y) * product;
            along_y += (below ? share_x : -share_x) * product;
          }
        }
      }
      cache_x[channel] = width * weight * along_x;
      cache_y[channel] = height * weight * along_y;
      cache_w[channel] = along_w;
      __syncthreads();
      const T sum_x = block_sum(cache_x), sum_y = block_sum(cache_y), sum_w = block_sum(cache_w);
      if (channel == 0) {
        grad_locations[2 * sample] = sum_x;
        grad_locations[2 * sample + 1] = sum_y;
        grad_weights[sample] = sum_w;
      }
      __syncthreads();
    }
  }
}

Sizes sizes_of(const Tensor& value, const Tensor& locations) {
  const auto size = [](const Tensor& tensor, int dim) { return static_cast<int>(tensor.size(dim)); };
  return {size(value, 0),     size(value, 1),     size(value, 2),    size(value, 3),
          size(locations, 1), size(locations, 3), size(locations, 4)};
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0);
  return static_cast<cudaStream_t>(stream);
}

template <typename Run>
void with_type(const Tensor& value, const Run& run) {
  if (value.scalar_type() == torch::headeronly::ScalarType::Double) {
    run(double{});
  } else {
    STD_TORCH_CHECK(value.scalar_type() == torch::headeronly::ScalarType::Float);
    run(float{});
  }
}

Tensor forward(Tensor value, Tensor shapes, Tensor starts, Tensor locations, Tensor weights) {
  const Sizes sizes = sizes_of(value, locations);
  Tensor output = torch::stable::new_empty(
      value, {value.size(0), locations.size(1), value.size(2) * value.size(3)});
  constexpr int threads = 1024;
  const int blocks = static_cast<int>((output.numel() + threads - 1) / threads);
  with_type(value, [&](auto t) {
    using T = decltype(t);
    baseline_forward<T><<<blocks, threads, 0, current_stream(value)>>>(
        sizes, value.const_data_ptr<T>(), shapes.const_data_ptr<int64_t>(),
        starts.const_data_ptr<int64_t>(), locations.const_data_ptr<T>(),
        weights.const_data_ptr<T>(), output.mutable_data_ptr<T>());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_output, Tensor value, Tensor shapes,
                                            Tensor starts, Tensor locations, Tensor weights) {
  const Sizes sizes = sizes_of(value, locations);
  const auto zeros_like = [](const Tensor& tensor) {
    const auto shape = tensor.sizes();
    return torch::stable::new_zeros(tensor, std::vector<int64_t>(shape.begin(), shape.end()));
  };
  Tensor grad_value = zeros_like(value);
  Tensor grad_locations = zeros_like(locations);
  Tensor grad_weights = zeros_like(weights);
  const int blocks = sizes.batch * sizes.num_queries * sizes.num_heads;
  with_type(value, [&](auto t) {
    using T = decltype(t);
    baseline_backward<T><<<blocks, sizes.head_size, 3 * sizes.head_size * sizeof(T),
                           current_stream(value)>>>(
        sizes, grad_output.const_data_ptr<T>(), value.const_data_ptr<T>(),
        shapes.const_data_ptr<int64_t>(), starts.const_data_ptr<int64_t>(),
        locations.const_data_ptr<T>(), weights.const_data_ptr<T>(),
        grad_value.mutable_data_ptr<T>(), grad_locations.mutable_data_ptr<T>(),
        grad_weights.mutable_data_ptr<T>());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_value, grad_locations, grad_weights};
}

} // namespace

STABLE_TORCH_LIBRARY(hf_querydet_baseline, library) {
  library.def("forward(Tensor value, Tensor shapes, Tensor starts, Tensor locations, "
              "Tensor weights) -> Tensor");
  library.def("backward(Tensor grad_output, Tensor value, Tensor shapes, Tensor starts, "
              "Tensor locations, Tensor weights) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(hf_querydet_baseline, CUDA, library) {
  library.impl("forward", TORCH_BOX(&forward));
  library.impl("backward", TORCH_BOX(&backward));
}
