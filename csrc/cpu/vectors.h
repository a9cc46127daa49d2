// Vectors of channels, in the compiler's own vector types: one source for AVX-512, AVX2, SSE, NEON.
//
// A vector is at least 32 bytes wide, whatever the machine has: the compiler splits it where
// registers are shorter, and sum4 below may rely on four lanes.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace hf_querydet::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif

// Type of all sums over values of type T.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A>
struct VectorType {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vector = typename VectorType<A>::type;

typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));

template <typename A>
inline Vector<A> broadcast(A number) {
  return number - Vector<A>{}; // not 0 + number: the compiler may not drop that for -0
}

// ---- load and store one vector; no alignment needed ----------------------------------------

template <typename T>
inline Vector<Sum<T>> load(const T* source) {
  Vector<Sum<T>> result;
  if constexpr (std::is_same_v<T, BFloat16>) {
    // Intrinsics: GCC 12 splits __builtin_convertvector into narrower pieces.
#if defined(__AVX512F__)
    result = (Vector<float>)_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))), 16);
#elif defined(__AVX2__)
    result = (Vector<float>)_mm256_slli_epi32(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))), 16);
#else
    Bits16 narrow;
    std::memcpy(&narrow, source, sizeof(narrow));
    const Bits32 wide = __builtin_convertvector(narrow, Bits32) << 16;
    std::memcpy(&result, &wide, sizeof(result));
#endif
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__AVX512F__)
    result = (Vector<float>)_mm512_cvtph_ps(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__F16C__)
    result =
        (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
    for (int lane = 0; lane < kLanes<float>; ++lane) {
      result[lane] = static_cast<float>(source[lane]);
    }
#endif
  } else {
    std::memcpy(&result, source, sizeof(result));
  }
  return result;
}

template <typename T>
inline void store(T* target, Vector<Sum<T>> vector) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    Bits32 bits;
    std::memcpy(&bits, &vector, sizeof(bits));
    // Round to nearest, ties to even. A NaN is set apart: the sum could carry it into infinity.
    const Bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const auto is_number = vector == vector;
    const Bits32 chosen = is_number ? rounded : (Bits32{} + 0x7fc0u);
#if defined(__AVX512F__)
    const __m256i narrow = _mm512_cvtepi32_epi16((__m512i)chosen);
#else
    const Bits16 narrow = __builtin_convertvector(chosen, Bits16);
#endif
    std::memcpy(target, &narrow, sizeof(narrow));
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                        _mm512_cvtps_ph((__m512)vector, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                     _mm256_cvtps_ph((__m256)vector, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int lane = 0; lane < kLanes<float>; ++lane) {
      target[lane] = static_cast<Half>(vector[lane]);
    }
#endif
  } else {
    std::memcpy(target, &vector, sizeof(vector));
  }
}

// A copy of a few dozen bytes, inline: a call, or the string instructions that compilers make of a
// memcpy of unknown size, would cost more than the copy.
inline void copy_bytes(void* target, const void* source, int64_t bytes) {
  char* to = static_cast<char*>(target);
  const char* from = static_cast<const char*>(source);
  for (; bytes >= 64; bytes -= 64, to += 64, from += 64) {
    std::memcpy(to, from, 64);
  }
  const auto copy = [&](auto size) {
    if (bytes & size.value) {
      std::memcpy(to, from, size.value);
      to += size.value;
      from += size.value;
    }
  };
  copy(std::integral_constant<int, 32>{});
  copy(std::integral_constant<int, 16>{});
  copy(std::integral_constant<int, 8>{});
  copy(std::integral_constant<int, 4>{});
  copy(std::integral_constant<int, 2>{});
}

// The first `count` lanes only; other lanes are read as zero and left unwritten.
template <typename T>
inline Vector<Sum<T>> load_first(const T* source, int64_t count) {
  T lanes[kLanes<Sum<T>>] = {};
  copy_bytes(lanes, source, count * sizeof(T));
  return load(lanes);
}

template <typename T>
inline void store_first(T* target, Vector<Sum<T>> vector, int64_t count) {
  T lanes[kLanes<Sum<T>>];
  store(lanes, vector);
  copy_bytes(target, lanes, count * sizeof(T));
}

// Copies between T and the type of sums. Both arrays must have room for a whole last vector.
template <typename T>
inline void widen(const T* source, Sum<T>* target, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<Sum<T>>) {
    store(target + i, load(source + i));
  }
}

template <typename T>
inline void narrow(const Sum<T>* source, T* target, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<Sum<T>>) {
    store(target + i, load(source + i));
  }
}

// ---- four horizontal sums at once ------------------------------------------------------------

template <typename A, int stride, int... lane>
inline Vector<A> add_neighbours(Vector<A> even, Vector<A> odd,
                                std::integer_sequence<int, lane...>) {
  constexpr int lanes = kLanes<A>;
  // Lane i takes from `even` where bit `stride` of i is 0, else from `odd`.
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(even, odd, ((lane & stride) ? lanes + lane : lane)...) +
      __builtin_shufflevector(
             even, odd, ((lane & stride) ? lanes + (lane ^ stride) : (lane ^ stride))...);
#else // GCC 11 has the same under another name
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> Lanes
      __attribute__((vector_size(kVectorBytes)));
  return __builtin_shuffle(even, odd, Lanes{((lane & stride) ? lanes + lane : lane)...}) +
      __builtin_shuffle(
             even, odd,
             Lanes{((lane & stride) ? lanes + (lane ^ stride) : (lane ^ stride))...});
#endif
}

template <typename A, int stride>
inline Vector<A> fold(Vector<A> sums) {
  if constexpr (stride < kLanes<A>) {
    return fold<A, stride * 2>(add_neighbours<A, stride>(
        sums, sums, std::make_integer_sequence<int, kLanes<A>>{}));
  } else {
    return sums;
  }
}

template <typename A>
struct FourType {
  typedef A type __attribute__((vector_size(4 * sizeof(A))));
};
template <typename A>
using Four = typename FourType<A>::type;

// The sum of the lanes of each vector.
template <typename A>
inline Four<A> sum4(Vector<A> a, Vector<A> b, Vector<A> c, Vector<A> d) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<A>>{};
  const Vector<A> ab = add_neighbours<A, 1>(a, b, lanes);
  const Vector<A> cd = add_neighbours<A, 1>(c, d, lanes);
  const Vector<A> sums = fold<A, 4>(add_neighbours<A, 2>(ab, cd, lanes));
  Four<A> first;
  std::memcpy(&first, &sums, sizeof(first));
  return first;
}

} // namespace hf_querydet::cpu
