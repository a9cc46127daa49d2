// Multi-scale deformable attention on the CPU. Contract and letters: ../ms_deform_attn.h.
//
// Channels of a head lie in vector registers; coordinates are computed for a block of samples at
// once, one sample to a lane. Samples outside their level are then passed over.
//
// Forward. The tokens of one (batch, head) are first copied into a map with a border of zeros:
// rows lie side by side, which a strided (B, S, M, D) tensor spreads over few cache sets, and a
// corner outside the level needs no test. Where there are too few samples to repay the copy (a
// decoder), the tensor is read in place instead.
//
// Backward. A unit is one level of one (batch, head). One thread owns a unit from beginning to
// end: it adds the value gradient of that level in its own map, and writes the gradients of the
// locations and weights that point into that level. So there are no atomics, and the result does
// not depend on the number of threads. Few samples in float or double are added in place instead.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../ms_deform_attn.h"
#include "vectors.h"

namespace hf_querydet::cpu {
namespace {

using torch::stable::Tensor;

// Samples whose coordinates are computed together; a multiple of every vector's lanes.
constexpr int64_t kSampleBlock = 64;
constexpr int64_t kCoordinateLanes = 16;
// Queries of one forward unit: long enough to amortise its start, short enough to share out.
constexpr int64_t kQueryBlock = 128;
// Copying a token costs about as much as this many samples read in place.
constexpr int64_t kSamplesPerPackedToken = 2;

constexpr int64_t round_up(int64_t number, int64_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

// ---- memory and threads ------------------------------------------------------------------------

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<std::byte, Free>;

Scratch allocate(int64_t bytes) {
  constexpr int64_t cache_line = 64;
  void* memory = std::aligned_alloc(cache_line, round_up(std::max<int64_t>(bytes, 1), cache_line));
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return Scratch(static_cast<std::byte*>(memory));
}

int64_t num_workers(int64_t num_units) {
  return std::min<int64_t>(num_units, torch::stable::get_num_threads());
}

// Calls run(unit, worker) for every unit; threads take the next unit when they are free.
template <typename Run>
void for_each_unit(int64_t num_units, const Run& run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(
      0, num_workers(num_units), 1, [&](int64_t first_worker, int64_t last_worker) {
        for (int64_t worker = first_worker; worker < last_worker; ++worker) {
          for (int64_t unit = next++; unit < num_units; unit = next++) {
            run(unit, worker);
          }
        }
      });
}

// ---- the problem in pointers -------------------------------------------------------------------

template <typename T, typename R>
struct Problem {
  explicit Problem(const Inputs& inputs)
      : inputs(inputs),
        value(inputs.value.const_data_ptr<T>()),
        locations(inputs.sampling_locations.const_data_ptr<R>()),
        weights(inputs.attention_weights.const_data_ptr<R>()),
        padded_head_size(round_up(inputs.head_size, kLanes<Sum<T>>)) {
    for (int dim = 0; dim < 3; ++dim) {
      value_stride[dim] = inputs.value.stride(dim);
      locations_stride[dim] = inputs.sampling_locations.stride(dim);
      weights_stride[dim] = inputs.attention_weights.stride(dim);
    }
  }

  const T* tokens(int64_t batch, int64_t head) const {
    return value + batch * value_stride[0] + head * value_stride[2];
  }
  const R* locations_of(int64_t batch, int64_t query, int64_t head) const {
    return locations + batch * locations_stride[0] + query * locations_stride[1] +
        head * locations_stride[2];
  }
  const R* weights_of(int64_t batch, int64_t query, int64_t head) const {
    return weights + batch * weights_stride[0] + query * weights_stride[1] +
        head * weights_stride[2];
  }

  const Inputs& inputs;
  const T* value;
  const R* locations;
  const R* weights;
  int64_t padded_head_size; // head_size up to whole vectors
  int64_t value_stride[3];     // batch, token, head
  int64_t locations_stride[3]; // batch, query, head
  int64_t weights_stride[3];   // batch, query, head
};

// ---- samples: from locations to cells and fractions ----------------------------------------------

// Facts about the level of each sample, laid out per sample so that a block needs no inner loop.
template <typename A>
struct LevelTable {
  explicit LevelTable(int64_t num_samples)
      : num_samples(num_samples),
        width(round_up(num_samples, kCoordinateLanes)),
        height(width.size()),
        rows(width.size()),
        row_length(width.size()),
        start(width.size()) {}

  int64_t num_samples;
  std::vector<A> width, height;
  std::vector<int64_t> rows;       // height again, which a float holds exactly only up to 2^24
  std::vector<int64_t> row_length; // of the level's map, or of the level, in cells
  std::vector<int64_t> start;      // of the level, in cells
};

// Locations and weights as they came. Room for a whole block is always computed, so that unused
// entries must hold numbers.
template <typename R>
struct RawSamples {
  alignas(64) R location[2 * kSampleBlock] = {};
  alignas(64) R weight[kSampleBlock] = {};

  void read(const R* locations, const R* weights, int64_t at, int64_t count) {
    copy_bytes(location + 2 * at, locations, 2 * count * sizeof(R));
    copy_bytes(weight + at, weights, count * sizeof(R));
  }
};

template <typename A>
struct Samples {
  alignas(64) A location[2 * kSampleBlock];
  alignas(64) A weight[kSampleBlock]; // zero where the sample takes no part
  // The corner at the top left: column and row, -1 to size - 1.
  alignas(64) int32_t column[kSampleBlock];
  alignas(64) int32_t row[kSampleBlock];
  alignas(64) int32_t inside[kSampleBlock];
  // Its element, for the first channel, in the maps; see bordered_cells.
  alignas(64) int64_t element[kSampleBlock];
  // Distance from that corner, 0 to 1, and the weight of each corner.
  alignas(64) A fraction_x[kSampleBlock];
  alignas(64) A fraction_y[kSampleBlock];
  alignas(64) A corner_weight[4][kSampleBlock];

  // Computes everything above, for samples first.. of the table.
  template <typename R>
  void locate(const RawSamples<R>& raw, const LevelTable<A>& table, int64_t first, int64_t count,
              int64_t cell_size) {
    const int64_t padded_count = round_up(count, kCoordinateLanes);
    widen_to<R>(raw.location, location, 2 * padded_count);
    widen_to<R>(raw.weight, weight, padded_count);
    const A* widths = table.width.data() + first;
    const A* heights = table.height.data() + first;
    const int64_t* row_lengths = table.row_length.data() + first;
    const int64_t* starts = table.start.data() + first;
    for (int64_t i = 0; i < padded_count; ++i) {
      A x = location[2 * i] * widths[i] - A(0.5);
      A y = location[2 * i + 1] * heights[i] - A(0.5);
      // False for NaN as well. Bitwise, so that there is no branch to break the vector loop.
      const bool is_inside = (x > A(-1)) & (x < widths[i]) & (y > A(-1)) & (y < heights[i]);
      // Any other sample is not read; this keeps its integers in range.
      x = is_inside ? x : A(-1);
      y = is_inside ? y : heights[i];
      const A w = is_inside ? weight[i] : A(0);
      int32_t x0 = static_cast<int32_t>(x);
      int32_t y0 = static_cast<int32_t>(y);
      x0 -= static_cast<A>(x0) > x; // conversion truncates, this makes it the floor
      y0 -= static_cast<A>(y0) > y;
      const A fx = x - static_cast<A>(x0);
      const A fy = y - static_cast<A>(y0);
      column[i] = x0;
      row[i] = y0;
      inside[i] = is_inside;
      element[i] = (starts[i] + (int64_t{y0} + 1) * row_lengths[i] + x0 + 1) * cell_size;
      fraction_x[i] = fx;
      fraction_y[i] = fy;
      weight[i] = w;
      corner_weight[0][i] = w * (1 - fx) * (1 - fy);
      corner_weight[1][i] = w * fx * (1 - fy);
      corner_weight[2][i] = w * (1 - fx) * fy;
      corner_weight[3][i] = w * fx * fy;
    }
  }

 private:
  template <typename R>
  static void widen_to(const R* source, A* target, int64_t count) {
    if constexpr (std::is_same_v<R, A>) {
      copy_bytes(target, source, count * sizeof(A));
    } else {
      widen(source, target, count);
    }
  }
};

// ---- maps with a border of zeros -----------------------------------------------------------------

// Column 0 of every row is zero and serves as the right border of the row above it too; there is
// one row of zeros on top and one at the bottom, and a cell for the right border of that.
int64_t bordered_cells(const Level& level) {
  return (level.height + 2) * (level.width + 1) + 1;
}

// Calls run(token of the level, cell of the bordered map) row by row, for `length` tokens each.
template <typename Run>
void for_each_row(const Level& level, const Run& run) {
  for (int64_t row = 0; row < level.height; ++row) {
    run(row * level.width, (row + 1) * (level.width + 1) + 1);
  }
}

template <typename T>
inline void copy_channels(T* target, const T* source, int64_t count) {
  // Constant sizes become a few vector moves.
  switch (count * sizeof(T)) {
    case 64: std::memcpy(target, source, 64); break;
    case 128: std::memcpy(target, source, 128); break;
    default: std::memcpy(target, source, count * sizeof(T));
  }
}

// Copies one level of one (batch, head) into its map.
template <typename T>
void pack_level(const Level& level, const T* tokens, int64_t token_stride, int64_t head_size,
                int64_t padded_head_size, T* map) {
  const int64_t row_length = (level.width + 1) * padded_head_size;
  std::memset(map, 0, (row_length + padded_head_size) * sizeof(T)); // top row, first border cell
  for_each_row(level, [&](int64_t token, int64_t cell) {
    const T* source = tokens + (level.start + token) * token_stride;
    T* target = map + cell * padded_head_size;
    for (int64_t column = 0; column < level.width; ++column) {
      copy_channels(target, source, head_size);
      std::memset(target + head_size, 0, (padded_head_size - head_size) * sizeof(T));
      source += token_stride;
      target += padded_head_size;
    }
    std::memset(target, 0, padded_head_size * sizeof(T)); // border of the next row
  });
  T* bottom = map + (level.height + 1) * row_length + padded_head_size;
  std::memset(bottom, 0, row_length * sizeof(T));
}

// ---- forward ---------------------------------------------------------------------------------

template <typename T>
struct Corners {
  const T* at[4]; // top left, top right, bottom left, bottom right
};

// Reads the bordered maps of one (batch, head).
template <typename T>
struct PackedSource {
  const T* maps;
  int64_t cell_size;

  Corners<T> corners(const LevelTable<Sum<T>>& table, const Samples<Sum<T>>& samples,
                     int64_t first, int64_t i) const {
    const T* top = maps + samples.element[i];
    const T* bottom = top + table.row_length[first + i] * cell_size;
    return {{top, top + cell_size, bottom, bottom + cell_size}};
  }
};

constexpr int64_t kNoToken = -1;

// The tokens at the four corners of a sample, kNoToken outside the level.
struct CornerTokens {
  int64_t at[4];
};

template <typename A>
inline CornerTokens corner_tokens(const LevelTable<A>& table, const Samples<A>& samples,
                                  int64_t first, int64_t i) {
  const int64_t width = table.row_length[first + i];
  const int64_t height = table.rows[first + i];
  const int64_t column = samples.column[i];
  const int64_t row = samples.row[i];
  const bool left = column >= 0, right = column + 1 < width;
  const bool top = row >= 0 && row < height, bottom = row + 1 < height;
  const int64_t token = table.start[first + i] + row * width + column;
  return {{top & left ? token : kNoToken, top & right ? token + 1 : kNoToken,
           bottom & left ? token + width : kNoToken,
           bottom & right ? token + width + 1 : kNoToken}};
}

// Reads the tokens of one (batch, head) in place; corners outside the level read `zeros`.
template <typename T>
struct DirectSource {
  const T* tokens;
  int64_t token_stride;
  const T* zeros;

  Corners<T> corners(const LevelTable<Sum<T>>& table, const Samples<Sum<T>>& samples,
                     int64_t first, int64_t i) const {
    const CornerTokens places = corner_tokens(table, samples, first, i);
    Corners<T> corners;
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t token = places.at[corner];
      corners.at[corner] = token == kNoToken ? zeros : tokens + token * token_stride;
    }
    return corners;
  }
};

// Adds the weighted corners of the samples to `num_vectors` vectors of channels.
template <int num_vectors, typename T, typename Source>
inline void gather(const Source& source, const LevelTable<Sum<T>>& table,
                   const Samples<Sum<T>>& samples, int64_t first, int64_t count, int64_t channel,
                   Vector<Sum<T>>* sums) {
  using A = Sum<T>;
  // Several sums per vector, so that an addition need not wait for the one before it; as many
  // as sixteen registers hold.
  constexpr int num_chains = num_vectors == 4 ? 2 : 4;
  Vector<A> chains[num_chains][num_vectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    if (!samples.inside[i]) {
      continue;
    }
    const Corners<T> corners = source.corners(table, samples, first, i);
    for (int corner = 0; corner < 4; ++corner) {
      const Vector<A> weight = broadcast(samples.corner_weight[corner][i]);
      for (int v = 0; v < num_vectors; ++v) {
        chains[corner % num_chains][v] +=
            weight * load(corners.at[corner] + channel + v * kLanes<A>);
      }
    }
  }
  for (int chain = 0; chain < num_chains; ++chain) {
    for (int v = 0; v < num_vectors; ++v) {
      sums[v] += chains[chain][v];
    }
  }
}

// Working memory of one thread.
template <typename T, typename R>
struct Block {
  RawSamples<R> raw;
  Samples<Sum<T>> samples;
};

// Fills one row of the output, for one (batch, query, head).
template <int num_vectors, typename T, typename R, typename Source>
inline void attend(const Source& source, const LevelTable<Sum<T>>& table, Block<T, R>& block,
                   const R* locations, const R* weights, int64_t head_size, int64_t cell_size,
                   T* output) {
  using A = Sum<T>;
  constexpr int64_t step = num_vectors * kLanes<A>;
  const int64_t num_samples = table.num_samples;
  for (int64_t channel = 0; channel < head_size; channel += step) {
    Vector<A> sums[num_vectors] = {};
    for (int64_t first = 0; first < num_samples; first += kSampleBlock) {
      const int64_t count = std::min(kSampleBlock, num_samples - first);
      if (channel == 0 || num_samples > kSampleBlock) {
        block.raw.read(locations + 2 * first, weights + first, 0, count);
        block.samples.locate(block.raw, table, first, count, cell_size);
      }
      gather<num_vectors, T>(source, table, block.samples, first, count, channel, sums);
    }
    for (int v = 0; v < num_vectors; ++v) {
      const int64_t begin = channel + v * kLanes<A>;
      if (begin + kLanes<A> <= head_size) {
        store(output + begin, sums[v]);
      } else if (begin < head_size) {
        store_first(output + begin, sums[v], head_size - begin);
      }
    }
  }
}

// Widest run of vectors that divides the head: 4, 2 or 1.
template <typename Run>
void with_num_vectors(int64_t total, const Run& run) {
  if (total % 4 == 0) {
    run(std::integral_constant<int, 4>{});
  } else if (total % 2 == 0) {
    run(std::integral_constant<int, 2>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

// One entry per (level, point), in cells of bordered maps or in tokens.
template <typename A>
LevelTable<A> table_of_all_levels(const Inputs& inputs, bool in_place) {
  LevelTable<A> table(inputs.num_levels * inputs.num_points);
  int64_t sample = 0;
  int64_t map_start = 0;
  for (const Level& level : inputs.levels) {
    for (int64_t point = 0; point < inputs.num_points; ++point, ++sample) {
      table.width[sample] = static_cast<A>(level.width);
      table.height[sample] = static_cast<A>(level.height);
      table.rows[sample] = level.height;
      table.row_length[sample] = in_place ? level.width : level.width + 1;
      table.start[sample] = in_place ? level.start : map_start;
    }
    map_start += bordered_cells(level);
  }
  return table;
}

template <typename T, typename R>
void forward_in_place(const Problem<T, R>& problem, T* output) {
  using A = Sum<T>;
  const Inputs& in = problem.inputs;
  const auto table = table_of_all_levels<A>(in, /*in_place=*/true);
  const std::vector<T> zeros(in.head_size, T(0));
  const int64_t num_rows = in.batch * in.num_queries * in.num_heads;
  with_num_vectors(problem.padded_head_size / kLanes<A>, [&](auto num_vectors) {
    for_each_unit((num_rows + kQueryBlock - 1) / kQueryBlock, [&](int64_t unit, int64_t) {
      Block<T, R> block;
      const int64_t end = std::min((unit + 1) * kQueryBlock, num_rows);
      for (int64_t row = unit * kQueryBlock; row < end; ++row) {
        const int64_t head = row % in.num_heads;
        const int64_t query = row / in.num_heads % in.num_queries;
        const int64_t batch = row / in.num_heads / in.num_queries;
        const DirectSource<T> source{problem.tokens(batch, head), problem.value_stride[1],
                                     zeros.data()};
        attend<num_vectors.value>(source, table, block,
                                  problem.locations_of(batch, query, head),
                                  problem.weights_of(batch, query, head), in.head_size,
                                  problem.padded_head_size, output + row * in.head_size);
      }
    });
  });
}

template <typename T, typename R>
void forward_packed(const Problem<T, R>& problem, T* output) {
  using A = Sum<T>;
  const Inputs& in = problem.inputs;
  const auto table = table_of_all_levels<A>(in, /*in_place=*/false);
  std::vector<int64_t> first_cell;
  int64_t cells = 0;
  for (const Level& level : in.levels) {
    first_cell.push_back(cells);
    cells += bordered_cells(level);
  }
  const int64_t map_size = cells * problem.padded_head_size;
  const int64_t num_slices = in.batch * in.num_heads;
  // As many (batch, head) at a time as there are threads: enough to keep them busy, and the maps
  // need a fraction of the memory of `value`.
  const int64_t group_size = num_workers(num_slices);
  const Scratch scratch = allocate(group_size * map_size * sizeof(T));
  T* maps = reinterpret_cast<T*>(scratch.get());

  const auto pack = [&](int64_t slice, int64_t level, T* map) {
    pack_level(in.levels[level], problem.tokens(slice / in.num_heads, slice % in.num_heads),
               problem.value_stride[1], in.head_size, problem.padded_head_size,
               map + first_cell[level] * problem.padded_head_size);
  };
  with_num_vectors(problem.padded_head_size / kLanes<A>, [&](auto num_vectors) {
    const auto attend_queries = [&](int64_t slice, const T* map, int64_t begin, int64_t end) {
      Block<T, R> block;
      const int64_t batch = slice / in.num_heads, head = slice % in.num_heads;
      const PackedSource<T> source{map, problem.padded_head_size};
      for (int64_t query = begin; query < end; ++query) {
        attend<num_vectors.value>(
            source, table, block, problem.locations_of(batch, query, head),
            problem.weights_of(batch, query, head), in.head_size, problem.padded_head_size,
            output + ((batch * in.num_queries + query) * in.num_heads + head) * in.head_size);
      }
    };

    // Slices that can be dealt out evenly need no thread to wait for another, which on a machine
    // with other work costs more than all the rest.
    const bool even = num_slices % group_size == 0 || num_slices >= 4 * group_size;
    if (even && group_size < num_slices) {
      for_each_unit(num_slices, [&](int64_t slice, int64_t worker) {
        T* map = maps + worker * map_size;
        for (int64_t level = 0; level < in.num_levels; ++level) {
          pack(slice, level, map);
        }
        attend_queries(slice, map, 0, in.num_queries);
      });
      return;
    }
    const int64_t num_blocks = (in.num_queries + kQueryBlock - 1) / kQueryBlock;
    for (int64_t group = 0; group < num_slices; group += group_size) {
      const int64_t size = std::min(group_size, num_slices - group);
      for_each_unit(size * in.num_levels, [&](int64_t unit, int64_t) {
        pack(group + unit % size, unit / size, maps + unit % size * map_size);
      });
      for_each_unit(size * num_blocks, [&](int64_t unit, int64_t) {
        const int64_t member = unit / num_blocks;
        const int64_t begin = unit % num_blocks * kQueryBlock;
        attend_queries(group + member, maps + member * map_size, begin,
                       std::min(begin + kQueryBlock, in.num_queries));
      });
    }
  });
}

// Whether there are too few samples to repay copying the tokens. A head that does not fill its
// last vector is always copied: only in a map may that vector be read whole.
template <typename T, typename R>
bool reads_in_place(const Problem<T, R>& problem) {
  const Inputs& in = problem.inputs;
  const int64_t samples_per_slice = in.num_queries * in.num_levels * in.num_points;
  return in.head_size == problem.padded_head_size &&
      samples_per_slice < kSamplesPerPackedToken * in.num_tokens;
}

template <typename T, typename R>
void forward_of_type(const Inputs& inputs, Tensor& output) {
  const Problem<T, R> problem(inputs);
  T* target = output.mutable_data_ptr<T>();
  if (reads_in_place(problem)) {
    forward_in_place(problem, target);
  } else {
    forward_packed(problem, target);
  }
}

// ---- backward --------------------------------------------------------------------------------

// Where a sample's corners are read and where their gradients are added.
template <typename T>
struct Places {
  const T* value[4];
  Sum<T>* grad[4];
};

// Bordered maps of one level.
template <typename T>
struct PackedTarget {
  static constexpr bool in_place = false;
  const T* value_map;
  Sum<T>* grad_map;
  int64_t cell_size;

  Places<T> places(const LevelTable<Sum<T>>& table, const Samples<Sum<T>>& samples,
                   int64_t i) const {
    const int64_t top = samples.element[i];
    const int64_t bottom = top + table.row_length[i] * cell_size;
    const int64_t element[4] = {top, top + cell_size, bottom, bottom + cell_size};
    Places<T> places;
    for (int corner = 0; corner < 4; ++corner) {
      places.value[corner] = value_map + element[corner];
      places.grad[corner] = grad_map + element[corner];
    }
    return places;
  }
};

// The tensors themselves; what a corner outside the level would get goes to `discarded`.
template <typename T>
struct DirectTarget {
  static constexpr bool in_place = true;
  const T* tokens;
  int64_t token_stride;
  const T* zeros;
  Sum<T>* grad_tokens;
  int64_t grad_token_stride;
  Sum<T>* discarded;

  Places<T> places(const LevelTable<Sum<T>>& table, const Samples<Sum<T>>& samples,
                   int64_t i) const {
    const CornerTokens corners = corner_tokens(table, samples, 0, i);
    Places<T> places;
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t token = corners.at[corner];
      places.value[corner] = token == kNoToken ? zeros : tokens + token * token_stride;
      places.grad[corner] = token == kNoToken ? discarded : grad_tokens + token * grad_token_stride;
    }
    return places;
  }
};

// Adds one query's samples of one level to the value gradient, and stores the products of the
// output gradient with the four corners of each sample in `dots`.
template <int num_vectors, typename T, typename Target>
inline void scatter(const Target& target, const LevelTable<Sum<T>>& table,
                    const Samples<Sum<T>>& samples, int64_t first, int64_t count,
                    const Vector<Sum<T>>* grad_output, int64_t channel, Four<Sum<T>>* dots) {
  using A = Sum<T>;
  for (int64_t i = first; i < first + count; ++i) {
    if (!samples.inside[i]) {
      dots[i] = Four<A>{};
      continue;
    }
    Vector<A> products[4] = {};
    const Places<T> places = target.places(table, samples, i);
    for (int corner = 0; corner < 4; ++corner) {
      const T* value = places.value[corner] + channel;
      A* grad_value = places.grad[corner] + channel;
      const Vector<A> weight = broadcast(samples.corner_weight[corner][i]);
      for (int v = 0; v < num_vectors; ++v) {
        products[corner] += grad_output[v] * load(value + v * kLanes<A>);
        store(grad_value + v * kLanes<A>,
              load(grad_value + v * kLanes<A>) + weight * grad_output[v]);
      }
    }
    const Four<A> sums = sum4<A>(products[0], products[1], products[2], products[3]);
    dots[i] = channel == 0 ? sums : dots[i] + sums;
  }
}

// Gradients of the weights and locations of a block, from the corner products.
template <typename A>
inline void finish_samples(const Samples<A>& samples, const Four<A>* dots, int64_t count, A width,
                           A height, A* grad_locations, A* grad_weights) {
  for (int64_t i = 0; i < count; ++i) {
    const A fx = samples.fraction_x[i], fy = samples.fraction_y[i], w = samples.weight[i];
    const Four<A> dot = dots[i];
    const A top = dot[0] + fx * (dot[1] - dot[0]);
    const A bottom = dot[2] + fx * (dot[3] - dot[2]);
    const A along_x = (dot[1] - dot[0]) * (1 - fy) + (dot[3] - dot[2]) * fy;
    const bool is_inside = samples.inside[i] != 0;
    // Selected, not multiplied by zero: an infinite output gradient must not reach these.
    grad_weights[i] = is_inside ? top + fy * (bottom - top) : A(0);
    grad_locations[2 * i] = is_inside ? width * w * along_x : A(0);
    grad_locations[2 * i + 1] = is_inside ? height * w * (bottom - top) : A(0);
  }
}

template <typename T, typename R>
struct Gradients {
  const T* output; // (B, Q, M * D)
  int64_t output_stride[2];
  T* value;
  R* locations;
  R* weights;
};

template <typename T>
void write_grad_value(const Level& level, const Sum<T>* grad_map, int64_t head_size,
                      int64_t cell_size, int64_t token_stride, T* grad_tokens) {
  using A = Sum<T>;
  for_each_row(level, [&](int64_t token, int64_t cell) {
    const A* source = grad_map + cell * cell_size;
    T* target = grad_tokens + (level.start + token) * token_stride;
    for (int64_t column = 0; column < level.width; ++column) {
      int64_t channel = 0;
      for (; channel + kLanes<A> <= head_size; channel += kLanes<A>) {
        store(target + channel, load(source + channel));
      }
      if (channel < head_size) {
        store_first(target + channel, load(source + channel), head_size - channel);
      }
      source += cell_size;
      target += token_stride;
    }
  });
}

// Results for a block of samples, before and after rounding to R.
template <typename A, typename R>
struct SampleGradients {
  alignas(64) A location[2 * kSampleBlock];
  alignas(64) A weight[kSampleBlock];
  alignas(64) R rounded_location[2 * kSampleBlock];
  alignas(64) R rounded_weight[kSampleBlock];
};

// All queries of one unit: one level of one (batch, head).
template <int num_vectors, typename T, typename R, typename Target>
void backward_unit(const Problem<T, R>& problem, const Gradients<T, R>& grads,
                   const Target& target, int64_t batch, int64_t head, int64_t level_index) {
  using A = Sum<T>;
  const Inputs& in = problem.inputs;
  const Level& level = in.levels[level_index];
  LevelTable<A> table(kSampleBlock);
  std::fill(table.width.begin(), table.width.end(), static_cast<A>(level.width));
  std::fill(table.height.begin(), table.height.end(), static_cast<A>(level.height));
  std::fill(table.rows.begin(), table.rows.end(), level.height);
  std::fill(table.row_length.begin(), table.row_length.end(),
            Target::in_place ? level.width : level.width + 1);
  std::fill(table.start.begin(), table.start.end(), Target::in_place ? level.start : 0);
  Block<T, R> block;
  SampleGradients<A, R> results;
  alignas(64) Four<A> dots[kSampleBlock];

  // A block is several queries with all their points, or some points of one query.
  const int64_t block_points = std::min(in.num_points, kSampleBlock);
  const int64_t block_queries = std::max<int64_t>(1, kSampleBlock / in.num_points);
  for (int64_t first_query = 0; first_query < in.num_queries; first_query += block_queries) {
    for (int64_t first_point = 0; first_point < in.num_points; first_point += block_points) {
      const int64_t queries = std::min(block_queries, in.num_queries - first_query);
      const int64_t points = std::min(block_points, in.num_points - first_point);
      const int64_t offset = level_index * in.num_points + first_point;
      const int64_t count = queries * points;
      for (int64_t i = 0; i < queries; ++i) {
        block.raw.read(problem.locations_of(batch, first_query + i, head) + 2 * offset,
                       problem.weights_of(batch, first_query + i, head) + offset, i * points,
                       points);
      }
      block.samples.locate(block.raw, table, 0, count, problem.padded_head_size);
      for (int64_t i = 0; i < queries; ++i) {
        const T* grad_output = grads.output + batch * grads.output_stride[0] +
            (first_query + i) * grads.output_stride[1] + head * in.head_size;
        for (int64_t channel = 0; channel < in.head_size; channel += num_vectors * kLanes<A>) {
          Vector<A> grad[num_vectors];
          for (int v = 0; v < num_vectors; ++v) {
            const int64_t begin = channel + v * kLanes<A>;
            grad[v] = begin + kLanes<A> <= in.head_size
                ? load(grad_output + begin)
                : load_first(grad_output + begin, std::max<int64_t>(0, in.head_size - begin));
          }
          scatter<num_vectors, T>(target, table, block.samples, i * points, points, grad, channel,
                                  dots);
        }
      }
      finish_samples(block.samples, dots, count, static_cast<A>(level.width),
                     static_cast<A>(level.height), results.location, results.weight);
      narrow(results.location, results.rounded_location, 2 * count);
      narrow(results.weight, results.rounded_weight, count);
      for (int64_t i = 0; i < queries; ++i) {
        const int64_t row = (batch * in.num_queries + first_query + i) * in.num_heads + head;
        const int64_t sample = row * in.num_levels * in.num_points + offset;
        copy_bytes(grads.locations + 2 * sample, results.rounded_location + 2 * i * points,
                   2 * points * sizeof(R));
        copy_bytes(grads.weights + sample, results.rounded_weight + i * points,
                   points * sizeof(R));
      }
    }
  }
}

// Calls run(batch, level, head, worker) for every unit. Neighbouring units are heads of one level:
// equal work for threads that run side by side, and no two of them write to one cache line.
template <typename Run>
void for_each_level(const Inputs& in, const Run& run) {
  for_each_unit(in.batch * in.num_levels * in.num_heads, [&](int64_t unit, int64_t worker) {
    run(unit / in.num_heads / in.num_levels, unit / in.num_heads % in.num_levels,
        unit % in.num_heads, worker);
  });
}

// Few samples, and a gradient that needs no wider type: no maps. `grad_value` must be zero.
template <typename T, typename R>
void backward_in_place(const Problem<T, R>& problem, const Gradients<T, R>& grads) {
  const Inputs& in = problem.inputs;
  const std::vector<T> zeros(in.head_size, T(0));
  with_num_vectors(problem.padded_head_size / kLanes<T>, [&](auto num_vectors) {
    for_each_level(in, [&](int64_t batch, int64_t level, int64_t head, int64_t) {
      std::vector<T> discarded(in.head_size);
      const DirectTarget<T> target{
          problem.tokens(batch, head),
          problem.value_stride[1],
          zeros.data(),
          grads.value + (batch * in.num_tokens * in.num_heads + head) * in.head_size,
          in.num_heads * in.head_size,
          discarded.data()};
      backward_unit<num_vectors.value>(problem, grads, target, batch, head, level);
    });
  });
}

template <typename T, typename R>
void backward_packed(const Problem<T, R>& problem, const Gradients<T, R>& grads) {
  using A = Sum<T>;
  const Inputs& in = problem.inputs;
  int64_t max_cells = 0;
  for (const Level& level : in.levels) {
    max_cells = std::max(max_cells, bordered_cells(level));
  }
  const int64_t map_size = round_up(max_cells * problem.padded_head_size, kVectorBytes);
  const int64_t scratch_bytes = map_size * (sizeof(T) + sizeof(A));
  const int64_t num_units = in.batch * in.num_levels * in.num_heads;
  const Scratch scratch = allocate(num_workers(num_units) * scratch_bytes);

  with_num_vectors(problem.padded_head_size / kLanes<A>, [&](auto num_vectors) {
    for_each_level(in, [&](int64_t batch, int64_t level_index, int64_t head, int64_t worker) {
      const Level& level = in.levels[level_index];
      A* grad_map = reinterpret_cast<A*>(scratch.get() + worker * scratch_bytes);
      T* value_map = reinterpret_cast<T*>(grad_map + map_size);
      pack_level(level, problem.tokens(batch, head), problem.value_stride[1], in.head_size,
                 problem.padded_head_size, value_map);
      std::memset(grad_map, 0, bordered_cells(level) * problem.padded_head_size * sizeof(A));
      const PackedTarget<T> target{value_map, grad_map, problem.padded_head_size};
      backward_unit<num_vectors.value>(problem, grads, target, batch, head, level_index);
      write_grad_value(level, grad_map, in.head_size, problem.padded_head_size,
                       in.num_heads * in.head_size,
                       grads.value + (batch * in.num_tokens * in.num_heads + head) * in.head_size);
    });
  });
}

template <typename T, typename R>
void backward_of_type(const Inputs& in, const Tensor& grad_output, Tensor& grad_value,
                      Tensor& grad_locations, Tensor& grad_weights) {
  const Problem<T, R> problem(in);
  const Gradients<T, R> grads{grad_output.const_data_ptr<T>(),
                              {grad_output.stride(0), grad_output.stride(1)},
                              grad_value.mutable_data_ptr<T>(),
                              grad_locations.mutable_data_ptr<R>(),
                              grad_weights.mutable_data_ptr<R>()};
  if constexpr (std::is_same_v<T, Sum<T>>) {
    if (reads_in_place(problem)) {
      torch::stable::zero_(grad_value);
      return backward_in_place(problem, grads);
    }
  }
  backward_packed(problem, grads);
}

// ---- operators -------------------------------------------------------------------------------

Tensor forward(Tensor value, std::vector<int64_t> spatial_shapes, Tensor sampling_locations,
               Tensor attention_weights) {
  const Inputs inputs = check_inputs(value, spatial_shapes, sampling_locations, attention_weights);
  const std::vector<int64_t> shape = {inputs.batch, inputs.num_queries,
                                      inputs.num_heads * inputs.head_size};
  if (inputs.attention_weights.numel() == 0) {
    return torch::stable::new_zeros(value, shape);
  }
  Tensor output = torch::stable::new_empty(value, shape);
  if (output.numel() != 0) {
    with_types(inputs, [&](auto t, auto r) {
      forward_of_type<decltype(t), decltype(r)>(inputs, output);
    });
  }
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_output, Tensor value,
                                            std::vector<int64_t> spatial_shapes,
                                            Tensor sampling_locations, Tensor attention_weights) {
  const Inputs inputs = check_inputs(value, spatial_shapes, sampling_locations, attention_weights);
  const Tensor grad = check_grad_output(grad_output, inputs);
  const auto like = [](const Tensor& tensor, bool zeros) {
    const auto sizes = tensor.sizes();
    const std::vector<int64_t> shape(sizes.begin(), sizes.end());
    return zeros ? torch::stable::new_zeros(tensor, shape)
                 : torch::stable::new_empty(tensor, shape);
  };
  const bool is_empty = grad.numel() == 0 || inputs.attention_weights.numel() == 0;
  Tensor grad_value = like(value, is_empty);
  Tensor grad_locations = like(sampling_locations, is_empty);
  Tensor grad_weights = like(attention_weights, is_empty);
  if (!is_empty) {
    with_types(inputs, [&](auto t, auto r) {
      backward_of_type<decltype(t), decltype(r)>(inputs, grad, grad_value, grad_locations,
                                                 grad_weights);
    });
  }
  return {grad_value, grad_locations, grad_weights};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_querydet, CPU, library) {
  library.impl("ms_deform_attn", TORCH_BOX(&forward));
  library.impl("ms_deform_attn_backward", TORCH_BOX(&backward));
}

} // namespace hf_querydet::cpu
