// What norms of rows and of groups share: statistics of a run, parameters in the dtype of the arithmetic, templates by flags.

#pragma once

#include "part.h"

namespace syncnorm {

// Elements summed in float32 before double takes over.
constexpr int64_t kRun = 4096;

// Squared distance of pivot and mean, in variances, up to which deviations from the pivot are good enough.
constexpr double kSafeShift = 16;

// Bytes from which results are written past the caches. With a reader that follows at once it costs a tenth at 8 MiB and saves
// one from 16 MiB on (2 MiB of L2 a core).
constexpr int64_t kStreamed = int64_t(1) << 24;

struct Sums { double first = 0, second = 0; };

// Σ(x - pivot) and Σ(x - pivot)² of a run; with a pivot of 0 the first is not formed.
template <bool kCentre, typename T> Sums sums_of(const T* x, int64_t n, acc_t<T> pivot) {
  using A = acc_t<T>;
  const vec_t<A> p = splat(pivot);
  Sums sums;
  for (int64_t start = 0; start < n; start += kRun) {
    const int64_t stop = std::min(n, start + kRun);
    vec_t<A> first[4] = {}, second[4] = {};
    int64_t i = start;
    for (; i + 4 * kLanes <= stop; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < 4; ++k) {
        const vec_t<A> d = kCentre ? load(x + i + k * kLanes) - p : load(x + i + k * kLanes);
        if (kCentre) first[k] += d;
        second[k] += d * d;
      }
    }
    columns(i, stop, [&](int64_t at, auto part) {
      const vec_t<A> d = kCentre ? part.keep(part.load(x + at) - p) : part.load(x + at);
      if (kCentre) first[0] += d;
      second[0] += d * d;
    });
    if (kCentre) sums.first += fold<A>((first[0] + first[1]) + (first[2] + first[3]));
    sums.second += fold<A>((second[0] + second[1]) + (second[2] + second[3]));
  }
  return sums;
}

// Mean and variance in one pass about a pivot; in a second one about the mean, if the pivot was far from it.
template <typename T> void moments_of(const T* x, int64_t n, double& mean, double& var) {
  using A = acc_t<T>;
  A pivot = static_cast<A>(x[n / 2]);
  const double share = 1.0 / n;
  for (int pass = 0; pass < 2; ++pass) {
    const Sums s = sums_of<true, T>(x, n, pivot);
    const double shift = s.first * share;
    mean = static_cast<double>(pivot) + shift;
    var = std::max(0.0, s.second * share - shift * shift);
    if (!(shift * shift > kSafeShift * var)) break;
    pivot = static_cast<A>(mean);
  }
}

// A parameter in the dtype of the arithmetic; undefined if there is none.
inline Tensor widened(const OptTensor& parameter, int64_t size, at::ScalarType dtype) {
  if (!parameter || !parameter->defined()) return Tensor();
  TORCH_CHECK(parameter->numel() == size, "expected a parameter of ", size, " entries, got ", parameter->numel());
  return parameter->to(dtype).contiguous();
}

template <typename T> const T* data_of(const Tensor& t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; }
template <typename T> const T* data_of(const OptTensor& t) { return t ? t->const_data_ptr<T>() : nullptr; }

inline at::ScalarType accumulate_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Whether rows of `out` are written past the caches: where they would not stay there, and start at whole vectors.
inline bool streams(const Tensor& out) {
  const int64_t bytes = kLanes * out.element_size();
  return out.nbytes() >= kStreamed && out.size(-1) % kLanes == 0 && reinterpret_cast<uintptr_t>(out.const_data_ptr()) % bytes == 0;
}

// Calls f with std::true_type or std::false_type for each flag.
template <typename F> void with_flags(F f) { f(); }
template <typename F, typename... Flags> void with_flags(F f, bool flag, Flags... rest) {
  if (flag) {
    with_flags([&](auto... more) { f(std::true_type(), more...); }, rest...);
  } else {
    with_flags([&](auto... more) { f(std::false_type(), more...); }, rest...);
  }
}

}  // namespace syncnorm
