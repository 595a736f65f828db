// What the native operators share: vectors of elements, widened on load and rounded on store, and lists of parameters.
//
// GCC's and clang's vector types, as many lanes as one register holds float32: the compiler makes AVX-512, AVX2 or NEON of
// them. Only conversions of half precision and bit masks need a word of each machine. at::vec lends exp and erf.

#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

namespace syncnorm {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

constexpr int64_t kLanes = at::vec::Vectorized<float>::size();
constexpr int64_t kUnit = 32768;  // elements per unit of work, about

// Sums and arithmetic: float32, or float64 for float64.
template <typename T> using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename E> struct VectorOf { typedef E type __attribute__((vector_size(kLanes * sizeof(E)))); };
template <typename E> using vec_t = typename VectorOf<E>::type;

// What a comparison of vectors gives: all ones in the lanes where it holds.
template <typename A> using lane_t = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;
template <typename A> using mask_t = vec_t<lane_t<A>>;

template <typename V> inline V read(const void* p) { V v; std::memcpy(&v, p, sizeof(V)); return v; }
template <typename V> inline void write(void* p, V v) { std::memcpy(p, &v, sizeof(V)); }

// ---- Loads. ----

inline vec_t<float> load(const float* p) { return read<vec_t<float>>(p); }
inline vec_t<double> load(const double* p) { return read<vec_t<double>>(p); }
inline vec_t<float> load(const at::BFloat16* p) {
#if defined(CPU_CAPABILITY_AVX512)
  // As one instruction: of the line below GCC makes two halves that it puts together.
  return (vec_t<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(p)), 16);
#endif
  const auto bits = __builtin_convertvector(read<vec_t<uint16_t>>(p), vec_t<uint32_t>) << 16;
  return read<vec_t<float>>(&bits);
}
inline vec_t<float> load(const at::Half* p) {
#if defined(CPU_CAPABILITY_AVX512)
  return (vec_t<float>)_mm512_cvtph_ps(read<__m256i>(p));
#elif defined(CPU_CAPABILITY_AVX2)
  return (vec_t<float>)_mm256_cvtph_ps(read<__m128i>(p));
#elif defined(__aarch64__)
  return __builtin_convertvector(read<vec_t<__fp16>>(p), vec_t<float>);
#else
  vec_t<float> v;
  for (int64_t l = 0; l < kLanes; ++l) v[l] = static_cast<float>(p[l]);
  return v;
#endif
}

// ---- Stores; `stream` bypasses the caches, and needs an address that is a multiple of the bytes written. ----

template <typename V> inline void put(void* p, V v, bool stream) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if (stream) {
    constexpr int kWords = sizeof(V) / 16;
    __m128i words[kWords];
    std::memcpy(words, &v, sizeof(V));
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (kWords >= 4) {
      for (int k = 0; k < kWords; k += 4) _mm512_stream_si512(static_cast<__m512i*>(p) + k / 4, read<__m512i>(words + k));
      return;
    }
#endif
    if constexpr (kWords >= 2) {
      for (int k = 0; k < kWords; k += 2) _mm256_stream_si256(static_cast<__m256i*>(p) + k / 2, read<__m256i>(words + k));
    } else {
      _mm_stream_si128(static_cast<__m128i*>(p), words[0]);
    }
    return;
  }
#endif
  write(p, v);
}

inline void store(float* p, vec_t<float> v, bool stream = false) { put(p, v, stream); }
inline void store(double* p, vec_t<double> v, bool stream = false) { put(p, v, stream); }
inline void store(at::BFloat16* p, vec_t<float> v, bool stream = false) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  put(p, (__m256i)_mm512_cvtneps_pbh((__m512)v), stream);
#else
  const auto bits = read<vec_t<uint32_t>>(&v);
  const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even; NaN stays NaN
  const auto narrow = (vec_t<uint32_t>)(v == v) & rounded | (vec_t<uint32_t>)(v != v) & 0x7fc0;
  put(p, __builtin_convertvector(narrow, vec_t<uint16_t>), stream);
#endif
}
inline void store(at::Half* p, vec_t<float> v, bool stream = false) {
#if defined(CPU_CAPABILITY_AVX512)
  put(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), stream);
#elif defined(CPU_CAPABILITY_AVX2)
  put(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), stream);
#elif defined(__aarch64__)
  put(p, __builtin_convertvector(v, vec_t<__fp16>), stream);
#else
  for (int64_t l = 0; l < kLanes; ++l) p[l] = static_cast<at::Half>(v[l]);
#endif
}

// Must follow streaming stores before another thread may read them.
inline void end_streaming() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// ---- Lanes. ----

// All lanes the same; `A() + value` would turn -0 into 0.
template <typename A> inline vec_t<A> splat(A value) { return value - vec_t<A>{}; }

template <typename A> inline A sum_of(vec_t<A> v) {
  A sum = 0;
  for (int64_t l = 0; l < kLanes; ++l) sum += v[l];
  return sum;
}

template <typename A> inline mask_t<A> lane_numbers() {
  mask_t<A> numbers;
  for (int64_t l = 0; l < kLanes; ++l) numbers[l] = l;
  return numbers;
}

// `function` maps at::vec::Vectorized<A>: f(v) with the vector functions of at::vec.
template <typename A, typename Function> inline vec_t<A> lanewise(vec_t<A> v, Function function) {
  using V = at::vec::Vectorized<A>;
  alignas(64) A lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int64_t l = 0; l < kLanes; l += V::size()) function(V::loadu(lanes + l)).store(lanes + l);
  return read<vec_t<A>>(lanes);
}

// ---- What is float64 and dense already: moments, sums, rows. ----

inline const double* doubles(const Tensor& t) {
  TORCH_CHECK(t.scalar_type() == at::kDouble && t.is_contiguous(), "expected dense float64");
  return t.const_data_ptr<double>();
}

// ---- Parameters: [C] vectors of any floating dtype, which may be missing. ----

template <typename V = double> std::vector<V> values_of(const OptTensor& vector, int64_t size, double missing) {
  std::vector<V> values(size, static_cast<V>(missing));
  if (vector && vector->defined()) {
    TORCH_CHECK(vector->numel() == size, "expected a parameter of ", size, " entries, got ", vector->numel());
    const Tensor dense = vector->contiguous();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dense.scalar_type(), "syncnorm::values_of", [&] {
      const scalar_t* data = dense.const_data_ptr<scalar_t>();
      for (int64_t i = 0; i < size; ++i) values[i] = static_cast<V>(data[i]);
    });
  }
  return values;
}

}  // namespace syncnorm
