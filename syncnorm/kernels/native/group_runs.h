// Group norm where channels come first: a group is a run of memory, and so is each of its channels.

#pragma once

#include "groups.h"

namespace syncnorm {

template <Shape kShape, typename T> [[gnu::always_inline]] inline void normalize_run(
    const Arguments<T>& f, const T* x, T* y, int64_t n, Affine<acc_t<T>> a, bool stream, int64_t ahead) {
  const auto mean = splat(a.mean), scale = splat(a.scale), offset = splat(a.offset);
  columns(0, n, [&](int64_t i, auto part) {
    prefetch(x + i + ahead);
    part.store(y + i, f.activation.template apply<kShape>((part.load(x + i) - mean) * scale + offset), stream);
  });
}

template <Shape kShape, typename T> void forward_run(const Arguments<T>& f, const Groups& s, int64_t group) {
  using A = acc_t<T>;
  const int64_t size = s.D * s.S, o = group * size, first = group % s.G * s.D;
  double mean, var;
  moments_of(f.x + o, size, mean, var, {f.out + o, s.stream});
  const auto statistics = statistics_of<A>(mean, var, f.eps);
  for (int64_t c = 0; c < s.D; ++c) {
    const auto affine = affine_of(statistics, f.weight[first + c], f.bias[first + c]);
    normalize_run<kShape>(f, f.x + o + c * s.S, f.out + o + c * s.S, s.S, affine, s.stream, size);
  }
  f.mean[group] = statistics.mean;
  f.rstd[group] = statistics.rstd;
}

// Sums of channels, as vectors until kLanes of them can be folded at once.
template <typename A> struct Waiting {
  vec_t<A> g[kLanes], gd[kLanes], ds{};
  int64_t count = 0;
  double d = 0;  // Σd of all channels so far

  // Adds them to the shares of the channels before `c`.
  void settle(const Shares& shares, int64_t c) {
    A sums[2 * kLanes];
    if (3 * count < kLanes) {
      for (int64_t k = 0; k < count; ++k) sums[k] = fold<A>(g[k]), sums[kLanes + k] = fold<A>(gd[k]);
    } else {
      for (int64_t k = count; k < kLanes; ++k) g[k] = gd[k] = vec_t<A>{};
      write(sums, fold_all<A>(g));
      write(sums + kLanes, fold_all<A>(gd));
    }
    double *to_g = shares.g + c - count, *to_gd = shares.gd + c - count;
    for (int64_t k = 0; k < count; ++k) to_g[k] += sums[k], to_gd[k] += sums[kLanes + k];
    count = 0;
    settle_d();
  }
  void settle_d() {
    d += fold<A>(ds);
    ds = vec_t<A>{};
  }
};

// Adds up a run of channel c.
template <Shape kShape, typename T> [[gnu::always_inline]] inline void reduce_run(
    const Arguments<T>& f, const T* grad, const T* x, int64_t n, Affine<acc_t<T>> a, Waiting<acc_t<T>>& waiting,
    const Shares& shares, int64_t c, Claim<T> claim) {
  using A = acc_t<T>;
  const auto mean = splat(a.mean), scale = splat(a.scale), offset = splat(a.offset);
  for (int64_t start = 0; start < n; start += kRun) {
    const int64_t stop = std::min(n, start + kRun);
    vec_t<A> g[2] = {}, gd[2] = {}, d[2] = {};
    auto step = [&](int64_t i, auto part, int64_t k) {
      claim(i);
      const vec_t<A> v = part.keep(part.load(x + i) - mean);
      const vec_t<A> slope = f.activation.template backward<kShape>(part.load(grad + i), v * scale + offset);
      g[k] += slope, gd[k] += slope * v, d[k] += v;
    };
    int64_t i = start;
    for (; i + 2 * kLanes <= stop; i += 2 * kLanes) step(i, Whole(), 0), step(i + kLanes, Whole(), 1);
    columns(i, stop, [&](int64_t at, auto part) { step(at, part, 0); });
    waiting.ds += d[0] + d[1];
    if (stop == n) {
      waiting.g[waiting.count] = g[0] + g[1], waiting.gd[waiting.count] = gd[0] + gd[1];
      ++waiting.count;
    } else {
      shares.g[c] += fold<A>(g[0] + g[1]), shares.gd[c] += fold<A>(gd[0] + gd[1]);
      waiting.settle_d();
    }
  }
}

template <Shape kShape, typename T> [[gnu::always_inline]] inline void backward_run(
    const Arguments<T>& f, const T* grad, const T* x, T* dx, int64_t n, Affine<acc_t<T>> a, Gradient<acc_t<T>> b, bool stream, int64_t ahead) {
  const auto mean = splat(a.mean), scale = splat(a.scale), offset = splat(a.offset);
  const auto b_scale = splat(b.scale), b_slope = splat(b.slope), b_offset = splat(b.offset);
  columns(0, n, [&](int64_t i, auto part) {
    prefetch(x + i + ahead);
    prefetch(grad + i + ahead);
    const auto d = part.load(x + i) - mean;
    const auto g = f.activation.template backward<kShape>(part.load(grad + i), d * scale + offset);
    part.store(dx + i, g * b_scale + (d * b_slope + b_offset), stream);
  });
}

template <Shape kShape, typename T> void backward_group(const Arguments<T>& f, const Groups& s, int64_t group, const Shares& shares) {
  using A = acc_t<T>;
  const int64_t size = s.D * s.S, o = group * size;
  const A *weight = f.weight + group % s.G * s.D, *bias = f.bias + group % s.G * s.D;
  const Statistics<A> statistics{f.mean[group], 0, f.rstd[group]};
  Waiting<A> waiting;
  for (int64_t c = 0; c < s.D; ++c) {
    const auto affine = affine_of(statistics, weight[c], bias[c]);
    const int64_t at = o + c * s.S;
    reduce_run<kShape>(f, f.grad + at, f.x + at, s.S, affine, waiting, shares, c, {f.out + at, s.stream});
    if (waiting.count == kLanes || c + 1 == s.D) waiting.settle(shares, c + 1);
  }
  const auto slopes = slopes_of(s, shares, weight, waiting.d, statistics.rstd);
  for (int64_t c = 0; c < s.D; ++c) {
    const int64_t at = o + c * s.S;
    const auto affine = affine_of(statistics, weight[c], bias[c]);
    backward_run<kShape>(f, f.grad + at, f.x + at, f.out + at, s.S, affine, slopes.gradient(weight[c]), s.stream, size);
  }
}

}  // namespace syncnorm
