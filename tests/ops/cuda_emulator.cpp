// Runs the device code of csrc/cuda on the CPU, so that its index arithmetic, its shuffles and its
// bounds are tested where there is no GPU. The 32 lanes of a warp are coroutines which take turns
// at every shuffle.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

#define __device__
#define __global__
#define __launch_bounds__(threads)

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx, blockDim;

struct float4 {
  float x, y, z, w;
};
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <typename T>
static void atomicAdd(T* target, T amount) { *target += amount; }
static void atomicAdd(float4* target, float4 amount) {
  *target = {target->x + amount.x, target->y + amount.y, target->z + amount.z, target->w + amount.w};
}
static int min(int a, int b) { return a < b ? a : b; }
using std::floor;

constexpr int kLanes = 32;
static double exchanged[kLanes]; // holds every int, float and double exactly
static ucontext_t scheduler, lanes[kLanes];
static std::vector<char> stacks[kLanes];
static bool finished[kLanes];
static int current;
static unsigned first_thread;
static const std::function<void()>* body;

static void wait_for_all_lanes() { swapcontext(&lanes[current], &scheduler); }

template <typename T, typename Source>
static T exchange(T mine, Source source_of) {
  exchanged[current] = mine;
  wait_for_all_lanes();
  const T result = static_cast<T>(exchanged[source_of(current)]);
  wait_for_all_lanes();
  return result;
}
template <typename T>
static T __shfl_sync(unsigned, T mine, int source, int width) {
  return exchange(mine, [=](int lane) { return lane / width * width + source % width; });
}
template <typename T>
static T __shfl_xor_sync(unsigned, T mine, int mask, int width) {
  return exchange(mine, [=](int lane) {
    const int source = lane ^ mask;
    return source / width == lane / width ? source : lane;
  });
}

#include "../../csrc/cuda/ms_deform_attn_kernels.cuh"

static void run_lane() {
  (*body)();
  finished[current] = true;
}

static void run_warp(const std::function<void()>& lane_body) {
  body = &lane_body;
  for (int lane = 0; lane < kLanes; ++lane) {
    stacks[lane].resize(1 << 16);
    finished[lane] = false;
    getcontext(&lanes[lane]);
    lanes[lane].uc_stack.ss_sp = stacks[lane].data();
    lanes[lane].uc_stack.ss_size = stacks[lane].size();
    lanes[lane].uc_link = &scheduler;
    makecontext(&lanes[lane], run_lane, 0);
  }
  for (int running = kLanes; running > 0;) {
    running = 0;
    int ended = 0;
    for (current = 0; current < kLanes; ++current) {
      if (!finished[current]) {
        threadIdx.x = first_thread + current;
        swapcontext(&scheduler, &lanes[current]);
        running += !finished[current];
      }
      ended += finished[current];
    }
    if (ended != 0 && ended != kLanes) {
      std::fprintf(stderr, "lanes of a warp do not shuffle together\n");
      std::abort();
    }
  }
}

static void launch(const hf_querydet::cuda::Shape& shape, const std::function<void()>& lane_body) {
  using hf_querydet::cuda::kThreadsPerBlock;
  blockDim.x = kThreadsPerBlock;
  const int64_t rows_per_block = kThreadsPerBlock / shape.group;
  for (blockIdx.x = 0; blockIdx.x * rows_per_block < shape.num_rows; ++blockIdx.x) {
    for (first_thread = 0; first_thread < kThreadsPerBlock; first_thread += kLanes) {
      run_warp(lane_body);
    }
  }
}

template <typename T, int kVector>
static void run(const int64_t* sizes, const int64_t* levels, const void* grad_output,
                const void* value, const void* locations, const void* weights, void* output,
                void* grad_value, void* grad_locations, void* grad_weights) {
  using namespace hf_querydet::cuda;
  using R = Sum<T>;
  Shape shape = {};
  const int64_t batch = sizes[0], tokens = sizes[1], heads = sizes[2], head_size = sizes[3];
  const int64_t queries = sizes[4], num_levels = sizes[5], points = sizes[6];
  shape.num_rows = batch * queries * heads;
  shape.num_queries = queries;
  shape.num_heads = heads;
  shape.head_size = head_size;
  shape.num_levels = num_levels;
  shape.num_points = points;
  shape.group = 1;
  while (shape.group < kWarpSize && shape.group * kVector < head_size) {
    shape.group *= 2;
  }
  int64_t start = 0;
  for (int64_t level = 0; level < num_levels; ++level) {
    shape.height[level] = levels[2 * level];
    shape.width[level] = levels[2 * level + 1];
    shape.start[level] = start;
    start += levels[2 * level] * levels[2 * level + 1];
  }
  const auto set = [](int64_t* stride, int64_t a, int64_t b, int64_t c) {
    stride[0] = a;
    stride[1] = b;
    stride[2] = c;
  };
  const int64_t samples = num_levels * points;
  set(shape.value_stride, tokens * heads * head_size, heads * head_size, head_size);
  set(shape.locations_stride, queries * heads * samples * 2, heads * samples * 2, samples * 2);
  set(shape.weights_stride, queries * heads * samples, heads * samples, samples);
  shape.grad_stride[0] = queries * heads * head_size;
  shape.grad_stride[1] = heads * head_size;
  launch(shape, [&] {
    forward_kernel<T, R, kVector>(shape, (const T*)value, (const R*)locations, (const R*)weights,
                                  (T*)output);
  });
  launch(shape, [&] {
    backward_kernel<T, R, kVector>(shape, (const T*)grad_output, (const T*)value,
                                   (const R*)locations, (const R*)weights, tokens,
                                   (Sum<T>*)grad_value, (R*)grad_locations, (R*)grad_weights);
  });
}

#define ENTRY(name, T, vector)                                                                   \
  extern "C" void name(const int64_t* sizes, const int64_t* levels, const void* grad_output,     \
                       const void* value, const void* locations, const void* weights,            \
                       void* output, void* grad_value, void* grad_locations,                     \
                       void* grad_weights) {                                                     \
    run<T, vector>(sizes, levels, grad_output, value, locations, weights, output, grad_value,    \
                   grad_locations, grad_weights);                                                \
  }
ENTRY(run_double_2, double, 2)
ENTRY(run_double_1, double, 1)
ENTRY(run_float_4, float, 4)
ENTRY(run_half_8, _Float16, 8)
