// Device code of multi-scale deformable attention. Contract and letters: ../ms_deform_attn.h.
//
// A row is one (batch, query, head). A group of threads, a power of two within one warp, works on
// a row; each thread has kVector neighbouring channels, 16 bytes of `value`, which it loads at
// once. The threads share the work of locating samples: thread t locates sample t, t + group, ...
// and hands the result round by shuffles, so that each location and weight is read once per row.

#pragma once

#include <cstdint>
#include <type_traits>

namespace hf_querydet::cuda {

constexpr int kThreadsPerBlock = 256;
constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxLevels = 32;
constexpr int kVectorBytes = 16;

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Passed by value: the kernels read it from constant memory.
struct Shape {
  int64_t num_rows; // B * Q * M
  int num_queries, num_heads, head_size, num_levels, num_points;
  int group; // threads of a row
  int height[kMaxLevels], width[kMaxLevels];
  int start[kMaxLevels];       // first token
  int64_t value_stride[3];     // batch, token, head
  int64_t locations_stride[3]; // batch, query, head
  int64_t weights_stride[3];   // batch, query, head
  int64_t grad_stride[2];      // batch, query; backward only
};

struct Row {
  bool is_real; // rows of the last block may be beyond the end; they repeat the last one
  int64_t index;
  int64_t batch, query, head;
};

__device__ inline Row this_row(const Shape& shape) {
  const int64_t index =
      int64_t{blockIdx.x} * (blockDim.x / shape.group) + threadIdx.x / shape.group;
  Row row;
  row.is_real = index < shape.num_rows;
  row.index = row.is_real ? index : shape.num_rows - 1;
  row.head = row.index % shape.num_heads;
  row.query = row.index / shape.num_heads % shape.num_queries;
  row.batch = row.index / shape.num_heads / shape.num_queries;
  return row;
}

// ---- samples -------------------------------------------------------------------------------------

template <typename A>
struct Sample {
  int token; // of the corner at the top left, which may lie outside the level
  int width; // of the level
  int corners; // bit i set: corner i (top left, top right, bottom left, bottom right) is inside
  A fraction_x, fraction_y, weight;
};

template <typename R, typename A>
__device__ inline Sample<A> locate(const Shape& shape, int number, const R* locations,
                                   const R* weights) {
  Sample<A> sample = {0, 0, 0, A(0), A(0), A(0)};
  if (number >= shape.num_levels * shape.num_points) {
    return sample;
  }
  const int level = number / shape.num_points;
  const int height = shape.height[level], width = shape.width[level];
  const A x = static_cast<A>(locations[2 * number]) * width - A(0.5);
  const A y = static_cast<A>(locations[2 * number + 1]) * height - A(0.5);
  // False for NaN as well.
  if (!(x > A(-1) && x < A(width) && y > A(-1) && y < A(height))) {
    return sample;
  }
  const A floor_x = floor(x), floor_y = floor(y);
  const int column = static_cast<int>(floor_x), row = static_cast<int>(floor_y);
  const int left = column >= 0, right = column + 1 < width;
  const int top = row >= 0, bottom = row + 1 < height;
  sample.token = shape.start[level] + row * width + column;
  sample.width = width;
  sample.corners = (top & left) | (top & right) << 1 | (bottom & left) << 2 | (bottom & right) << 3;
  sample.fraction_x = x - floor_x;
  sample.fraction_y = y - floor_y;
  sample.weight = static_cast<A>(weights[number]);
  return sample;
}

// The sample that thread `source` of the group has located.
template <typename A>
__device__ inline Sample<A> shared_sample(const Sample<A>& mine, int source, int group) {
  return {__shfl_sync(kAllLanes, mine.token, source, group),
          __shfl_sync(kAllLanes, mine.width, source, group),
          __shfl_sync(kAllLanes, mine.corners, source, group),
          __shfl_sync(kAllLanes, mine.fraction_x, source, group),
          __shfl_sync(kAllLanes, mine.fraction_y, source, group),
          __shfl_sync(kAllLanes, mine.weight, source, group)};
}

__device__ inline int64_t corner_token(int token, int width, int corner) {
  return int64_t{token} + (corner & 1) + (corner >> 1) * width;
}

// ---- vectors of channels -------------------------------------------------------------------------

template <typename T, int kVector>
struct alignas(kVector * sizeof(T)) Channels {
  T at[kVector];
};

template <int kVector, typename T>
__device__ inline Channels<T, kVector> load(const T* source) {
  return *reinterpret_cast<const Channels<T, kVector>*>(source);
}

// Hopper and later add four floats in one memory operation.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasVectorAtomics = true;
#else
constexpr bool kHasVectorAtomics = false;
#endif

template <int kVector, typename A>
__device__ inline void add_atomically(A* target, const A* amounts) {
  if constexpr (kHasVectorAtomics && std::is_same_v<A, float> && kVector % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      atomicAdd(reinterpret_cast<float4*>(target + i),
                make_float4(amounts[i], amounts[i + 1], amounts[i + 2], amounts[i + 3]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      atomicAdd(target + i, amounts[i]);
    }
  }
}

// ---- kernels -------------------------------------------------------------------------------------

template <typename T, typename R, int kVector>
__global__ void __launch_bounds__(kThreadsPerBlock)
    forward_kernel(const Shape shape, const T* __restrict__ value,
                   const R* __restrict__ locations, const R* __restrict__ weights,
                   T* __restrict__ output) {
  using A = Sum<T>;
  const Row row = this_row(shape);
  const int group = shape.group;
  const int lane = threadIdx.x % group;
  const T* tokens =
      value + row.batch * shape.value_stride[0] + row.head * shape.value_stride[2];
  const R* row_locations = locations + row.batch * shape.locations_stride[0] +
      row.query * shape.locations_stride[1] + row.head * shape.locations_stride[2];
  const R* row_weights = weights + row.batch * shape.weights_stride[0] +
      row.query * shape.weights_stride[1] + row.head * shape.weights_stride[2];
  const int num_samples = shape.num_levels * shape.num_points;

  for (int first = 0; first < shape.head_size; first += group * kVector) {
    const int channel = first + lane * kVector;
    const bool has_channels = channel < shape.head_size;
    A sums[kVector] = {};
    for (int base = 0; base < num_samples; base += group) {
      const Sample<A> mine = locate<R, A>(shape, base + lane, row_locations, row_weights);
      const int count = min(group, num_samples - base);
      for (int i = 0; i < count; ++i) {
        const Sample<A> sample = shared_sample(mine, i, group);
        const A fx = sample.fraction_x, fy = sample.fraction_y;
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          if (has_channels && (sample.corners >> corner & 1)) {
            const A share = (corner & 1 ? fx : 1 - fx) * (corner >> 1 ? fy : 1 - fy);
            const A weight = sample.weight * share;
            const int64_t token = corner_token(sample.token, sample.width, corner);
            const auto channels =
                load<kVector>(tokens + token * shape.value_stride[1] + channel);
#pragma unroll
            for (int v = 0; v < kVector; ++v) {
              sums[v] += weight * static_cast<A>(channels.at[v]);
            }
          }
        }
      }
    }
    if (row.is_real && has_channels) {
      Channels<T, kVector> rounded;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        rounded.at[v] = static_cast<T>(sums[v]);
      }
      *reinterpret_cast<Channels<T, kVector>*>(output + row.index * shape.head_size + channel) =
          rounded;
    }
  }
}

// Adds to `grad_value`, (B, S, M, D) in the type of sums; writes the two other gradients.
template <typename T, typename R, int kVector>
__global__ void __launch_bounds__(kThreadsPerBlock)
    backward_kernel(const Shape shape, const T* __restrict__ grad_output,
                    const T* __restrict__ value, const R* __restrict__ locations,
                    const R* __restrict__ weights, int64_t num_tokens,
                    Sum<T>* __restrict__ grad_value, R* __restrict__ grad_locations,
                    R* __restrict__ grad_weights) {
  using A = Sum<T>;
  const Row row = this_row(shape);
  const int group = shape.group;
  const int lane = threadIdx.x % group;
  const T* tokens =
      value + row.batch * shape.value_stride[0] + row.head * shape.value_stride[2];
  const int64_t grad_token_stride = int64_t{shape.num_heads} * shape.head_size;
  A* grad_tokens = grad_value + row.batch * num_tokens * grad_token_stride +
      row.head * shape.head_size;
  const T* row_grad = grad_output + row.batch * shape.grad_stride[0] +
      row.query * shape.grad_stride[1] + row.head * shape.head_size;
  const R* row_locations = locations + row.batch * shape.locations_stride[0] +
      row.query * shape.locations_stride[1] + row.head * shape.locations_stride[2];
  const R* row_weights = weights + row.batch * shape.weights_stride[0] +
      row.query * shape.weights_stride[1] + row.head * shape.weights_stride[2];
  const int num_samples = shape.num_levels * shape.num_points;

  for (int base = 0; base < num_samples; base += group) {
    const Sample<A> mine = locate<R, A>(shape, base + lane, row_locations, row_weights);
    const int count = min(group, num_samples - base);
    A my_weight = 0, my_x = 0, my_y = 0; // gradients of the sample that this thread has located
    for (int first = 0; first < shape.head_size; first += group * kVector) {
      const int channel = first + lane * kVector;
      const bool has_channels = row.is_real && channel < shape.head_size;
      A grad[kVector] = {};
      if (has_channels) {
        const auto channels = load<kVector>(row_grad + channel);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          grad[v] = static_cast<A>(channels.at[v]);
        }
      }
      for (int i = 0; i < count; ++i) {
        const Sample<A> sample = shared_sample(mine, i, group);
        const A fx = sample.fraction_x, fy = sample.fraction_y;
        A along_weight = 0, along_x = 0, along_y = 0;
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          if (has_channels && (sample.corners >> corner & 1)) {
            const A share_x = corner & 1 ? fx : 1 - fx;
            const A share_y = corner >> 1 ? fy : 1 - fy;
            const int64_t token = corner_token(sample.token, sample.width, corner);
            const auto channels =
                load<kVector>(tokens + token * shape.value_stride[1] + channel);
            const A weight = sample.weight * share_x * share_y;
            A product = 0;
            A amounts[kVector];
#pragma unroll
            for (int v = 0; v < kVector; ++v) {
              product += grad[v] * static_cast<A>(channels.at[v]);
              amounts[v] = weight * grad[v];
            }
            add_atomically<kVector>(grad_tokens + token * grad_token_stride + channel, amounts);
            along_weight += share_x * share_y * product;
            along_x += (corner & 1 ? share_y : -share_y) * product;
            along_y += (corner >> 1 ? share_x : -share_x) * product;
          }
        }
        // Sums over the channels: all threads of the group get them, the sample's owner keeps them.
        for (int offset = group / 2; offset > 0; offset /= 2) {
          along_weight += __shfl_xor_sync(kAllLanes, along_weight, offset, group);
          along_x += __shfl_xor_sync(kAllLanes, along_x, offset, group);
          along_y += __shfl_xor_sync(kAllLanes, along_y, offset, group);
        }
        if (lane == i) {
          my_weight += along_weight;
          my_x += along_x;
          my_y += along_y;
        }
      }
    }
    if (row.is_real && lane < count) {
      const int number = base + lane;
      const int level = number / shape.num_points;
      const int64_t target = row.index * num_samples + number;
      // A sample outside its level has width 0 and weight 0 here, and zero gradients.
      grad_weights[target] = static_cast<R>(my_weight);
      grad_locations[2 * target] = static_cast<R>(mine.weight * shape.width[level] * my_x);
      grad_locations[2 * target + 1] = static_cast<R>(mine.weight * shape.height[level] * my_y);
    }
  }
}

} // namespace hf_querydet::cuda
