// Activations of vectors and their derivatives. ReLU and leaky ReLU need the sign alone, SiLU and GELU go through exp or erf.

#pragma once

#include "common.h"

namespace syncnorm {

// The codes of `activation` in the operators' arguments.
enum class Function : int64_t { kNone = 0, kRelu = 1, kLeakyRelu = 2, kSilu = 3, kGelu = 4 };

// What is compiled apart; the rest is decided while running.
enum class Shape { kNone, kPiecewise, kSmooth };

struct Activation {
  Function function;
  double slope;

  Activation(int64_t code, double negative_slope) : function(static_cast<Function>(code)), slope(negative_slope) {
    TORCH_CHECK(0 <= code && code <= 4, "unknown activation ", code);
  }

  Shape shape() const {
    if (function == Function::kNone) return Shape::kNone;
    return function == Function::kSilu || function == Function::kGelu ? Shape::kSmooth : Shape::kPiecewise;
  }
};

// e^x within 2 ulp, in line: a call of sleef's costs twice as much, as it saves no vector register. Coefficients of cephes.
inline vec_t<float> exp_of(vec_t<float> x) {
  x = x > 89.0f ? splat(89.0f) : x;
  x = x < -104.0f ? splat(-104.0f) : x;  // NaN stays NaN
  const vec_t<float> n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // the nearest integer
  const vec_t<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vec_t<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  // 2^n in two factors: one alone would overflow, or underflow, before the product does.
  const vec_t<int32_t> whole = __builtin_convertvector(n, vec_t<int32_t>), half = whole >> 1;
  return p * (vec_t<float>)((half + 127) << 23) * (vec_t<float>)((whole - half + 127) << 23);
}
inline vec_t<double> exp_of(vec_t<double> x) {
  return lanewise<double>(x, [](auto u) { return u.exp(); });
}

// The cumulative distribution of the standard normal, and its density.
struct Normal {
  vec_t<float> cdf, density;
  explicit Normal(vec_t<float> x) {
    // Abramowitz & Stegun 7.1.26, error 1.5e-7, as in torch's own vectors: the exponential serves both.
    const vec_t<float> z = x * 0.7071067811865476f, size = z < 0 ? -z : z;
    const vec_t<float> e = exp_of(-z * z), t = 1.0f / (size * 0.3275911f + 1.0f);
    vec_t<float> p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vec_t<float> tail = p * t * e * 0.5f;
    cdf = x < 0 ? tail : 1.0f - tail;
    density = e * 0.3989422804014327f;
  }
};
struct WideNormal {
  vec_t<double> cdf, density;
  explicit WideNormal(vec_t<double> x)
      : cdf(0.5 + 0.5 * lanewise<double>(x * 0.7071067811865476, [](auto u) { return u.erf(); })),
        density(exp_of(x * x * -0.5) * 0.3989422804014327) {}
};
template <typename A> using normal_t = std::conditional_t<std::is_same_v<A, double>, WideNormal, Normal>;

// An activation of vectors of A.
template <typename A> struct Activated {
  explicit Activated(const Activation& activation)
      : slope(splat(static_cast<A>(activation.slope))),
        keep(activation.function == Function::kLeakyRelu ? ~mask_t<A>{} : mask_t<A>{}),
        is_silu(activation.function == Function::kSilu) {}

  template <Shape kShape> vec_t<A> apply(vec_t<A> pre) const {
    if constexpr (kShape == Shape::kNone) {
      return pre;
    } else if constexpr (kShape == Shape::kPiecewise) {
      return pre <= 0 ? negative(pre) : pre;  // NaN stays NaN
    } else if (is_silu) {
      return pre / (1 + exp_of(-pre));
    } else {
      return pre * normal_t<A>(pre).cdf;
    }
  }

  // `grad` times the derivative at `pre`.
  template <Shape kShape> vec_t<A> backward(vec_t<A> grad, vec_t<A> pre) const {
    if constexpr (kShape == Shape::kNone) {
      return grad;
    } else if constexpr (kShape == Shape::kPiecewise) {
      return pre <= 0 ? negative(grad) : grad;
    } else if (is_silu) {
      const vec_t<A> sigmoid = 1 / (1 + exp_of(-pre));
      return grad * (sigmoid * (1 + pre * (1 - sigmoid)));
    } else {
      const normal_t<A> normal(pre);
      return grad * (normal.cdf + pre * normal.density);
    }
  }

  // The same from bits, one for each lane, that say where `pre` was positive.
  vec_t<A> backward(vec_t<A> grad, uint32_t positive) const {
    mask_t<A> weights;
    for (int64_t l = 0; l < kLanes; ++l) weights[l] = 1 << l;
    const mask_t<A> bits = weights & static_cast<lane_t<A>>(positive);
    return bits != 0 ? grad : negative(grad);
  }

 private:
  // Masked and not multiplied by 0 for ReLU: an infinite gradient must not become NaN.
  vec_t<A> negative(vec_t<A> v) const { return (vec_t<A>)((mask_t<A>)(v * slope) & keep); }

  vec_t<A> slope;
  mask_t<A> keep;
  bool is_silu;
};

// One bit for each lane: whether it is positive.
inline uint32_t positive_bits(vec_t<float> v) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GT_OQ);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_movemask_ps((__m256)(v > 0));
#else
  uint32_t bits = 0;
  for (int64_t l = 0; l < kLanes; ++l) bits |= static_cast<uint32_t>(v[l] > 0) << l;
  return bits;
#endif
}
inline uint32_t positive_bits(vec_t<double> v) {
  uint32_t bits = 0;
  for (int64_t l = 0; l < kLanes; ++l) bits |= static_cast<uint32_t>(v[l] > 0) << l;
  return bits;
}

}  // namespace syncnorm
