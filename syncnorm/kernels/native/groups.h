// What the paths of group norm share: shapes, and the few numbers of a group that its elements need.

#pragma once

#include "rows.h"

namespace syncnorm {

// N samples of C channels in G groups of D, S values each.
struct Groups {
  int64_t N, C, S, G, D;
  bool inner;   // [N, S, C] in memory, else [N, C, S]
  bool stream;  // outputs bypass the caches
};

// What one element needs: pre = (x - mean)·scale + offset.
template <typename A> struct Affine { A mean, scale, offset; };

// Statistics of a group: the mean as it is subtracted, what it lacks to the true one, and 1 / sqrt(var + eps).
template <typename A> struct Statistics { A mean, lack, rstd; };

template <typename A> Affine<A> affine_of(const Statistics<A>& s, A weight, A bias) {
  const A scale = s.rstd * weight;
  return {s.mean, scale, bias - s.lack * scale};
}

template <typename A> Statistics<A> statistics_of(double mean, double var, double eps) {
  const A held = static_cast<A>(mean);
  return {held, static_cast<A>(mean - static_cast<double>(held)), static_cast<A>(1 / std::sqrt(var + eps))};
}

// dx = g'·scale + (x - mean)·slope + offset.
template <typename A> struct Gradient { A scale, slope, offset; };

// The coefficients of dx = rstd·((u - a) - d·b) of a group, from Σu, Σu·d and Σd, with d = x - mean; share is 1 / size.
template <typename A> struct Slopes {
  A a, b, rstd, lack;
  Slopes(double u, double ud, double d, A rstd_, double share) : rstd(rstd_) {
    const double shift = d * share, slope = (ud - shift * u) * rstd * rstd * share;  // the mean was rounded, shift is what it lacks
    b = static_cast<A>(slope), a = static_cast<A>(u * share - shift * slope), lack = static_cast<A>(shift);
  }
  Gradient<A> gradient(A weight) const { return {weight * rstd, -b * rstd, -a * rstd}; }
};

template <typename T> struct Arguments {
  using A = acc_t<T>;
  const T *grad, *x;
  T* out;
  A *mean, *rstd;
  const A *weight, *bias;  // [C], or in small spaces [C·S]
  double eps;
  Activated<A> activation;
};

// Of each channel of one sample: Σg' and Σg'·d, then Σg'·x̂; its share in the gradients of bias and weight.
struct Shares { double *g, *gd; };

// Slopes of a group from the shares of its channels, which then become those in the parameters.
template <typename A> Slopes<A> slopes_of(
    const Groups& s, const Shares& shares, const A* weight, double d, A rstd) {
  double u = 0, ud = 0, u_odd = 0, ud_odd = 0;  // an addition waits for the one before
  int64_t c = 0;
  for (; c + 2 <= s.D; c += 2) {
    u += weight[c] * shares.g[c], ud += weight[c] * shares.gd[c];
    u_odd += weight[c + 1] * shares.g[c + 1], ud_odd += weight[c + 1] * shares.gd[c + 1];
  }
  if (c < s.D) u += weight[c] * shares.g[c], ud += weight[c] * shares.gd[c];
  u += u_odd, ud += ud_odd;
  const Slopes<A> slopes(u, ud, d, rstd, 1.0 / (s.D * s.S));
  for (c = 0; c < s.D; ++c) shares.gd[c] = (shares.gd[c] - slopes.lack * shares.g[c]) * rstd;
  return slopes;
}

}  // namespace syncnorm
