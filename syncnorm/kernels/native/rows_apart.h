// Norms of rows whose features lie apart: the channels of [N, D, S], where each of the S positions is a row. Positions side by
// side fill the vectors, so nothing is transposed; a tile of them, with all its features, is read from memory once.

#pragma once

#include "rows.h"

namespace syncnorm {

// Bytes of a tile: with its results, and a gradient, it stays in the second cache (2 MiB a core).
constexpr int64_t kTileBytes = int64_t(1) << 18;

// Features that are added up in float32 before double takes over. A position has one sum, a row whole vectors of them.
constexpr int64_t kFeatures = 16;

// N samples of D features and S positions, in tiles of `width` positions.
struct Apart {
  int64_t N, D, S, width, tiles;

  Apart(int64_t N_, int64_t D_, int64_t S_, int64_t element) : N(N_), D(D_), S(S_) {
    const int64_t most = std::max(4 * kLanes, kTileBytes / (D * element)), wanted = (S + most - 1) / most;
    width = ((S + wanted - 1) / wanted + kLanes - 1) / kLanes * kLanes;
    tiles = (S + width - 1) / width;
  }
  int64_t units() const { return N * tiles; }
  int64_t row(int64_t unit) const { return unit / tiles * S + unit % tiles * width; }
  int64_t origin(int64_t unit) const { return unit / tiles * D * S + unit % tiles * width; }
  int64_t count(int64_t unit) const { return std::min(width, S - unit % tiles * width); }
};

// f(feature, how many at once) for features [begin, end).
template <typename F> inline void each_features(int64_t begin, int64_t end, F f) {
  int64_t c = begin;
  for (; c + kTogether <= end; c += kTogether) f(c, std::integral_constant<int64_t, kTogether>());
  for (; c < end; ++c) f(c, std::integral_constant<int64_t, 1>());
}

// Adds up K terms of each element over the features, per position, into the rows of `sums`. terms(element, feature, position,
// part, out) sets them.
template <int K, typename A, typename Terms>
void sum_features(int64_t D, int64_t n, Table<A>& block, Table<double>& sums, Terms terms) {
  for (int64_t start = 0; start < D; start += kFeatures) {
    for (int k = 0; k < K; ++k) std::fill_n(block[k], block.width, A(0));
    each_features(start, std::min(D, start + kFeatures), [&](int64_t c, auto together) {
      constexpr int64_t kCount = together;
      columns(0, n, [&](int64_t i, auto part) {
        vec_t<A> sum[K];
        for (int k = 0; k < K; ++k) sum[k] = load(block[k] + i);
#pragma GCC unroll 4
        for (int64_t j = 0; j < kCount; ++j) {
          vec_t<A> out[K];
          terms(c + j, i, part, out);
          for (int k = 0; k < K; ++k) sum[k] += out[k];
        }
        for (int k = 0; k < K; ++k) store(block[k] + i, sum[k]);
      });
    });
    for (int k = 0; k < K; ++k) {
      double* to = sums[k];
      const A* from = block[k];
      if (start == 0) {
        std::copy_n(from, n, to);
      } else {
        for (int64_t i = 0; i < n; ++i) to[i] += from[i];
      }
    }
  }
}

// ---- Forward. ----

// A weight and a bias for each feature.
template <bool kCentre, typename T>
void forward_tile(const ForwardRows<T>& f, const Apart& s, int64_t unit, Table<acc_t<T>>& vectors, Table<double>& sums) {
  using A = acc_t<T>;
  const int64_t n = s.count(unit), ahead = s.origin(unit + 1) - s.origin(unit);
  const T* x = f.x + s.origin(unit);
  T* y = f.y + s.origin(unit);
  if (f.residual) {
    T* h = f.h + s.origin(unit);
    for (int64_t c = 0; c < s.D; ++c) add_row(x + c * s.S, f.residual + s.origin(unit) + c * s.S, h + c * s.S, n);
    x = h;
  }
  A *centre = vectors[0], *scale = vectors[1], *shift = vectors[2];
  constexpr int kSums = kCentre ? 2 : 1;
  Table<A> block(kSums, n);
  const Claim<T> claim{y, f.stream};
  const double share = 1.0 / s.D, eps = f.eps;
  double *second = sums[0], *first = sums[kSums - 1];
  if (kCentre) columns(0, n, [&](int64_t i, auto part) { store(centre + i, part.load(x + s.D / 2 * s.S + i)); });
  for (int pass = 0; pass < 2; ++pass) {
    sum_features<kSums>(s.D, n, block, sums, [&](int64_t c, int64_t i, auto part, vec_t<A>* out) {
      claim(c * s.S + i);
      vec_t<A> v = part.load(x + c * s.S + i);
      if (kCentre) v -= load(centre + i);
      out[0] = v * v;
      if constexpr (kCentre) out[1] = v;
    });
    int far = 0;
#pragma omp simd reduction(| : far)
    for (int64_t i = 0; i < n; ++i) {
      const double off = kCentre ? first[i] * share : 0, var = std::max(0.0, second[i] * share - off * off);
      const double mean = kCentre ? centre[i] + off : 0, rstd = 1 / std::sqrt(var + eps);
      far |= off * off > kSafeShift * var;
      scale[i] = static_cast<A>(rstd);
      if (kCentre) {
        const A held = static_cast<A>(mean);
        centre[i] = held, shift[i] = static_cast<A>((held - mean) * rstd);  // what rounding takes is given back
      }
    }
    if (!far) break;
  }
  std::copy_n(scale, n, f.rstd + s.row(unit));
  if (kCentre) std::copy_n(centre, n, f.mean + s.row(unit));
  each_features(0, s.D, [&](int64_t c, auto together) {
    constexpr int64_t kCount = together;
    columns(0, n, [&](int64_t i, auto part) {
      vec_t<A> m{}, more{};
      const vec_t<A> r = load(scale + i);
      if (kCentre) m = load(centre + i), more = load(shift + i);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kCount; ++j) {
        const int64_t at = (c + j) * s.S + i;
        prefetch(x + at + ahead);
        const vec_t<A> v = part.load(x + at);
        const vec_t<A> x_hat = kCentre ? (v - m) * r + more : v * r;
        part.store(y + at, x_hat * splat(f.weight[c + j]) + splat(f.bias[c + j]), f.stream);
      }
    });
  });
  if (f.stream) end_streaming();
}

template <bool kCentre, typename T> void forward_apart(const ForwardRows<T>& f, const Apart& s) {
  at::parallel_for(0, s.units(), 1, [&](int64_t begin, int64_t end) {
    Table<acc_t<T>> vectors(3, s.width);
    Table<double> sums(2, s.width);
    for (int64_t unit = begin; unit < end; ++unit) forward_tile<kCentre>(f, s, unit, vectors, sums);
  });
}

// ---- Backward. ----

// `dweight` and `dbias` are a vector of lanes for each feature.
template <bool kCentre, typename T>
void backward_tile(
    const BackwardRows<T>& f, const Apart& s, int64_t unit, Table<acc_t<T>>& vectors, Table<double>& sums, acc_t<T>* dweight,
    acc_t<T>* dbias) {
  using A = acc_t<T>;
  constexpr int kSums = kCentre ? 3 : 1;
  const int64_t n = s.count(unit), origin = s.origin(unit), ahead = s.origin(unit + 1) - origin;
  const T *grad = f.grad + origin, *h = f.h + origin;
  const A* rstd = f.rstd + s.row(unit);
  A *centre = vectors[0], *scale = vectors[1], *slope = vectors[2], *offset = vectors[3], *shift = vectors[4];
  Table<A> block(kSums, n);
  const Claim<T> claim{f.dx + origin, f.stream};
  const double share = 1.0 / s.D;
  std::copy_n(rstd, n, scale);
  if (kCentre) std::copy_n(f.mean + s.row(unit), n, centre);
  sum_features<kSums>(s.D, n, block, sums, [&](int64_t c, int64_t i, auto part, vec_t<A>* out) {
    claim(c * s.S + i);
    vec_t<A> d = part.load(h + c * s.S + i);
    if (kCentre) d -= load(centre + i);
    const vec_t<A> u = part.load(grad + c * s.S + i) * splat(f.weight[c]);
    out[0] = u * d;
    if constexpr (kCentre) out[1] = u, out[2] = d;
  });
  const double *ud = sums[0], *u = sums[kSums / 2], *d = sums[kSums - 1];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double r = rstd[i], lack = kCentre ? d[i] * share : 0, total = kCentre ? u[i] : 0;
    const double b = (ud[i] - lack * total) * r * r * share, a = total * share - lack * b;
    slope[i] = static_cast<A>(-b * r), offset[i] = static_cast<A>(-a * r), shift[i] = static_cast<A>(-lack * r);
  }
  each_features(0, s.D, [&](int64_t c, auto together) {
    constexpr int64_t kCount = together;
    vec_t<A> dw[kCount] = {}, db[kCount] = {};
    columns(0, n, [&](int64_t i, auto part) {
      vec_t<A> m{}, more{}, plus{};
      const vec_t<A> r = load(scale + i), b = load(slope + i);
      if (kCentre) m = load(centre + i), plus = load(offset + i), more = load(shift + i);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kCount; ++j) {
        const int64_t at = (c + j) * s.S + i;
        prefetch(h + at + ahead);
        prefetch(grad + at + ahead);
        vec_t<A> v = part.load(h + at);
        const vec_t<A> g = part.load(grad + at);
        if (kCentre) v -= m;
        vec_t<A> dx = g * splat(f.weight[c + j]) * r + (kCentre ? v * b + plus : v * b);
        if (f.grad_h) dx += part.load(f.grad_h + origin + at);
        part.store(f.dx + origin + at, dx, f.stream);
        dw[j] += g * (kCentre ? v * r + more : v * r), db[j] += g;
      }
    });
    for (int64_t j = 0; j < kCount; ++j) {
      A *to_w = dweight + (c + j) * kLanes, *to_b = dbias + (c + j) * kLanes;
      store(to_w, load(to_w) + dw[j]), store(to_b, load(to_b) + db[j]);
    }
  });
  if (f.stream) end_streaming();
}

// Adds the gradients of weight and bias to total [2, D].
template <bool kCentre, typename T> void backward_apart(const BackwardRows<T>& f, const Apart& s, std::vector<double>& total) {
  using A = acc_t<T>;
  // Tiles that share a sum, of up to 256 terms a lane: the same for any number of threads.
  const int64_t most = std::max<int64_t>(1, 256 * kLanes / s.width), share = std::clamp<int64_t>(s.units() / 32, 1, most);
  const int64_t ranges = (s.units() + share - 1) / share, padded = (s.D + kLanes - 1) / kLanes * kLanes;
  std::vector<A> folded(ranges * 2 * padded);
  at::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
    Table<A> vectors(5, s.width);
    Table<double> sums(3, s.width);
    std::vector<A> lanes(2 * padded * kLanes);
    for (int64_t range = begin; range < end; ++range) {
      std::fill(lanes.begin(), lanes.end(), A(0));
      for (int64_t unit = range * share; unit < std::min(s.units(), (range + 1) * share); ++unit) {
        backward_tile<kCentre>(f, s, unit, vectors, sums, lanes.data(), lanes.data() + padded * kLanes);
      }
      for (int64_t c = 0; c < 2 * padded; c += kLanes) {
        vec_t<A> v[kLanes];
        for (int64_t k = 0; k < kLanes; ++k) v[k] = load(lanes.data() + (c + k) * kLanes);
        write(folded.data() + range * 2 * padded + c, fold_all<A>(v));
      }
    }
  });
  for (int64_t range = 0; range < ranges; ++range) {
    const A* more = folded.data() + range * 2 * padded;
    for (int64_t i = 0; i < s.D; ++i) total[i] += more[i], total[s.D + i] += more[padded + i];
  }
}

}  // namespace syncnorm
