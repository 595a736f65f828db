// Loops over runs that need not fill their last vector.

#pragma once

#include "common.h"

namespace syncnorm {

// The first n elements, and zeros; n elements back.
template <typename T> inline vec_t<acc_t<T>> load_some(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <typename T> inline void store_some(T* p, vec_t<acc_t<T>> v, int64_t n) {
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

#if defined(CPU_CAPABILITY_AVX512)
inline vec_t<float> load_some(const float* p, int64_t n) { return (vec_t<float>)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
inline void store_some(float* p, vec_t<float> v, int64_t n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v); }
template <typename T> inline vec_t<float> load_some_halves(const T* p, int64_t n) {
  const __m256i halves = _mm256_maskz_loadu_epi16((1u << n) - 1, p);
  return load(reinterpret_cast<const T*>(&halves));
}
template <typename T> inline void store_some_halves(T* p, vec_t<float> v, int64_t n) {
  __m256i halves;
  store(reinterpret_cast<T*>(&halves), v);
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, halves);
}
inline vec_t<float> load_some(const at::BFloat16* p, int64_t n) { return load_some_halves(p, n); }
inline vec_t<float> load_some(const at::Half* p, int64_t n) { return load_some_halves(p, n); }
inline void store_some(at::BFloat16* p, vec_t<float> v, int64_t n) { store_some_halves(p, v, n); }
inline void store_some(at::Half* p, vec_t<float> v, int64_t n) { store_some_halves(p, v, n); }
#endif

// How a step of `columns` reads and writes: a whole vector, or its first n lanes. `keep` clears the lanes beyond.
struct Whole {
  template <typename T> vec_t<acc_t<T>> load(const T* p) const { return syncnorm::load(p); }
  template <typename T, typename V> void store(T* p, V v, bool stream = false) const { syncnorm::store(p, v, stream); }
  template <typename V> V keep(V v) const { return v; }
};
struct Some {
  int64_t n;
  template <typename T> vec_t<acc_t<T>> load(const T* p) const { return load_some(p, n); }
  template <typename T, typename V> void store(T* p, V v, bool = false) const { store_some(p, v, n); }
  template <typename V> V keep(V v) const {
    using A = std::remove_reference_t<decltype(v[0])>;
    const mask_t<A> kept = lane_numbers<A>() < static_cast<std::remove_reference_t<decltype(lane_numbers<A>()[0])>>(n);
    return (V)((mask_t<A>)v & kept);
  }
};

// step(i, Whole()) for each full vector of [begin, end), and step(i, Some{n}) for what is left.
template <typename Step> inline void columns(int64_t begin, int64_t end, Step step) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) step(i, Whole());
  if (i < end) step(i, Some{end - i});
}

// The sum of all lanes, as a tree: additions one after the other would wait for each other.
template <typename A, int64_t kWidth = kLanes, typename V> inline A fold(const V& v) {
  if constexpr (kWidth == 2) {
    return v[0] + v[1];
  } else {
    typedef A Half __attribute__((vector_size(kWidth / 2 * sizeof(A))));
    return fold<A, kWidth / 2>(read<Half>(&v) + read<Half>(reinterpret_cast<const char*>(&v) + sizeof(Half)));
  }
}

// The sums of kLanes vectors, in their order.
template <typename A> inline vec_t<A> fold_all(vec_t<A>* v) {
#if defined(__GNUC__) && !defined(__clang__)
  if constexpr (!std::is_same_v<A, double>) {
    auto level = [&]<int64_t kWidth>(auto self, std::integral_constant<int64_t, kWidth>) {
      // Two vectors of blocks of 2·kWidth lanes become one of twice as many blocks of kWidth: their halves, added.
      mask_t<A> low;
      for (int64_t l = 0; l < kLanes; ++l) {
        const int64_t block = l / kWidth;
        low[l] = block % 2 * kLanes + block / 2 * 2 * kWidth + l % kWidth;
      }
      const mask_t<A> high = low + static_cast<lane_t<A>>(kWidth);
      for (int64_t i = 0; i < kWidth; ++i) {
        v[i] = __builtin_shuffle(v[i], v[i + kWidth], low) + __builtin_shuffle(v[i], v[i + kWidth], high);
      }
      if constexpr (kWidth > 1) self(self, std::integral_constant<int64_t, kWidth / 2>());
    };
    level(level, std::integral_constant<int64_t, kLanes / 2>());
    return v[0];
  }
#endif
  vec_t<A> sums;
  for (int64_t l = 0; l < kLanes; ++l) sums[l] = fold<A>(v[l]);
  return sums;
}

}  // namespace syncnorm
