// The four primitives of batch normalisation on CPU, each one pass over memory, with all arithmetic per channel inside.
//
// A flat input is [N, C, S] (channels first) or [M, C] (channels innermost). Work is cut into the same units whatever the
// number of threads, and partial sums are added in the order of the units, so results do not depend on the threads.
//
// Plain loops, and GCC's and clang's vector types where sums must stay in registers: the compiler makes AVX-512, AVX2 or
// NEON of both. bfloat16 and float16 are widened in registers. Sums run in float32 over 8 or 16 terms and are then carried on in double. That is not caution: data
// far from zero is quantised, the squares of its deviations share their low bits, and a float32 sum of a few hundred of them
// rounds down more often than up (5e-7 of the variance at mean/std = 1e4, more than torch's own layer loses).

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

constexpr int64_t kLanes = 16;         // one AVX-512 register of float32
constexpr int64_t kVectors = 8;        // registers added up in float32 before double takes over
constexpr int64_t kRows = 16;          // the same for rows of channels-innermost data
constexpr int64_t kUnit = 32768;       // elements per unit of work, about
constexpr double kSafeShift = 64;      // squared distance of pivot and mean, in variances, up to which one pass is exact

// ---- Elements: memory type to arithmetic type and back. ----

template <typename T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };
template <typename T> using acc_t = typename Accumulate<T>::type;

inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }
inline float load(const at::BFloat16* p) {
  uint32_t bits = static_cast<uint32_t>(p->x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float load(const at::Half* p) {
#if defined(__FLT16_MANT_DIG__)
  _Float16 value;
  std::memcpy(&value, p, 2);
  return static_cast<float>(value);
#else
  return static_cast<float>(*p);
#endif
}
inline void store(float* p, float v) { *p = v; }
inline void store(double* p, double v) { *p = v; }
inline void store(at::BFloat16* p, float v) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->x = static_cast<uint16_t>(v == v ? rounded : 0x7fc0u);
}
inline void store(at::Half* p, float v) {
#if defined(__FLT16_MANT_DIG__)
  _Float16 value = static_cast<_Float16>(v);
  std::memcpy(p, &value, 2);
#else
  *p = static_cast<at::Half>(v);
#endif
}

// ---- Vectors of kLanes elements, as wide as float32 fills an AVX-512 register; narrower machines use several. ----

template <typename A> struct Vector { typedef A type __attribute__((vector_size(kLanes * sizeof(A)))); };
template <typename A> using vec_t = typename Vector<A>::type;

inline vec_t<float> load_vector(const float* p) { vec_t<float> v; std::memcpy(&v, p, sizeof(v)); return v; }
inline vec_t<double> load_vector(const double* p) { vec_t<double> v; std::memcpy(&v, p, sizeof(v)); return v; }
inline vec_t<float> load_vector(const at::BFloat16* p) {
  vec_t<uint16_t> half;
  std::memcpy(&half, p, sizeof(half));
  const vec_t<uint32_t> bits = __builtin_convertvector(half, vec_t<uint32_t>) << 16;
  vec_t<float> v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}
inline vec_t<float> load_vector(const at::Half* p) {
#if defined(__FLT16_MANT_DIG__)
  vec_t<_Float16> half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, vec_t<float>);
#else
  vec_t<float> v;
  for (int64_t l = 0; l < kLanes; ++l) v[l] = static_cast<float>(p[l]);
  return v;
#endif
}

// ---- Shapes. ----

struct Flat {
  int64_t outer, channels, inner;  // [N, C, S], or [M, C] with inner = 1 and rows of channels
  bool channels_first;
};

Flat flat_of(const Tensor& x) {
  TORCH_CHECK(x.is_contiguous() && (x.dim() == 2 || x.dim() == 3), "expected a contiguous [N, C, S] or [M, C] tensor");
  if (x.dim() == 3) return {x.size(0), x.size(1), x.size(2), true};
  return {x.size(0), x.size(1), 1, false};
}

template <typename T> const T* data_or_null(const OptTensor& t) { return t ? t->const_data_ptr<T>() : nullptr; }

OptTensor as_double(const OptTensor& t) { return t && t->defined() ? OptTensor(t->to(at::kDouble).contiguous()) : std::nullopt; }

// ---- Two sums per channel over one or two inputs. ----
//
// step(first, second, a, b, u) adds the two terms of elements a and b to the sums; u is the entry of the channel. It is
// called with numbers and with vectors of them.

// Adds up one row, the elements of one channel in one sample, into kLanes double accumulators for each of the two sums.
template <typename T, typename A, typename Step>
void sum_run(const T* a, const T* b, int64_t n, A u, Step step, vec_t<double>& first, vec_t<double>& second) {
  int64_t i = 0;
  for (; i + kVectors * kLanes <= n; i += kVectors * kLanes) {
    vec_t<A> p0{}, q0{}, p1{}, q1{};  // two chains hide the latency of an addition
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; v += 2) {
      const int64_t j = i + v * kLanes;
      step(p0, q0, load_vector(a + j), load_vector(b + j), u);
      step(p1, q1, load_vector(a + j + kLanes), load_vector(b + j + kLanes), u);
    }
    first += __builtin_convertvector(p0 + p1, vec_t<double>);
    second += __builtin_convertvector(q0 + q1, vec_t<double>);
  }
  vec_t<A> p{}, q{};
  for (; i + kLanes <= n; i += kLanes) step(p, q, load_vector(a + i), load_vector(b + i), u);
  A p_tail = 0, q_tail = 0;
  for (; i < n; ++i) step(p_tail, q_tail, load(a + i), load(b + i), u);
  p[0] += p_tail;
  q[0] += q_tail;
  first += __builtin_convertvector(p, vec_t<double>);
  second += __builtin_convertvector(q, vec_t<double>);
}

// Adds up four rows of C channels, then one: a visit of the sums costs more than the arithmetic.
template <typename T, typename A, typename Step>
void sum_four_rows(
    const T* __restrict__ a, const T* __restrict__ b, int64_t C, const A* __restrict__ vector, Step step,
    A* __restrict__ first, A* __restrict__ second) {
  for (int64_t c = 0; c < C; ++c) {
    const A u = vector[c];
    A p = 0, q = 0;
    step(p, q, load(a + c), load(b + c), u);
    step(p, q, load(a + C + c), load(b + C + c), u);
    step(p, q, load(a + 2 * C + c), load(b + 2 * C + c), u);
    step(p, q, load(a + 3 * C + c), load(b + 3 * C + c), u);
    first[c] += p;
    second[c] += q;
  }
}

template <typename T, typename A, typename Step>
void sum_row(
    const T* __restrict__ a, const T* __restrict__ b, int64_t C, const A* __restrict__ vector, Step step,
    A* __restrict__ first, A* __restrict__ second) {
  for (int64_t c = 0; c < C; ++c) step(first[c], second[c], load(a + c), load(b + c), vector[c]);
}

// Channels first: blocks of channels, so that a lane is folded once for all samples of a unit, times ranges of samples.
template <typename T, typename Step>
void sum_channels_first(const T* a, const T* b, const Flat& f, const acc_t<T>* vector, double* sums, Step step) {
  const int64_t N = f.outer, C = f.channels, S = f.inner;
  const int64_t width = std::clamp<int64_t>(kUnit / S, 1, std::min<int64_t>(C, 64));
  const int64_t blocks = (C + width - 1) / width;
  const int64_t depth = std::max<int64_t>(1, kUnit / (width * S));  // samples per unit, at least
  const int64_t ranges = std::clamp<int64_t>(64 / blocks, 1, std::max<int64_t>(1, N / depth));
  std::vector<double> partial(ranges * 2 * C);
  at::parallel_for(0, blocks * ranges, 1, [&](int64_t begin, int64_t end) {
    std::vector<vec_t<double>> lanes(width * 2);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit % blocks, range = unit / blocks;
      const int64_t c0 = block * width, c1 = std::min(C, c0 + width);
      std::fill(lanes.begin(), lanes.end(), vec_t<double>{});
      for (int64_t n = range * N / ranges; n < (range + 1) * N / ranges; ++n) {
        for (int64_t c = c0; c < c1; ++c) {
          const int64_t offset = (n * C + c) * S;
          vec_t<double>* lane = lanes.data() + (c - c0) * 2;
          sum_run<T, acc_t<T>>(a + offset, b + offset, S, vector[c], step, lane[0], lane[1]);
        }
      }
      for (int64_t c = c0; c < c1; ++c) {
        const vec_t<double>* lane = lanes.data() + (c - c0) * 2;
        double first = 0, second = 0;
        for (int64_t l = 0; l < kLanes; ++l) first += lane[0][l], second += lane[1][l];
        partial[range * 2 * C + c] = first;
        partial[range * 2 * C + C + c] = second;
      }
    }
  });
  std::fill(sums, sums + 2 * C, 0.0);
  for (int64_t range = 0; range < ranges; ++range) {
    for (int64_t c = 0; c < 2 * C; ++c) sums[c] += partial[range * 2 * C + c];
  }
}

// Channels innermost: ranges of rows.
template <typename T, typename Step>
void sum_channels_last(const T* a, const T* b, const Flat& f, const acc_t<T>* vector, double* sums, Step step) {
  using A = acc_t<T>;
  const int64_t M = f.outer, C = f.channels;
  const int64_t ranges = std::clamp<int64_t>(M * C / kUnit, 1, std::min<int64_t>(64, M));
  std::vector<double> partial(ranges * 2 * C, 0.0);
  at::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> block(2 * C);
    for (int64_t range = begin; range < end; ++range) {
      double* out = partial.data() + range * 2 * C;
      const int64_t stop = (range + 1) * M / ranges;
      for (int64_t r = range * M / ranges; r < stop;) {
        std::fill(block.begin(), block.end(), A(0));
        const int64_t r1 = std::min(stop, r + kRows);
        A *first = block.data(), *second = first + C;
        for (; r + 4 <= r1; r += 4) sum_four_rows(a + r * C, b + r * C, C, vector, step, first, second);
        for (; r < r1; ++r) sum_row(a + r * C, b + r * C, C, vector, step, first, second);
        for (int64_t c = 0; c < 2 * C; ++c) out[c] += block[c];
      }
    }
  });
  std::fill(sums, sums + 2 * C, 0.0);
  for (int64_t range = 0; range < ranges; ++range) {
    for (int64_t c = 0; c < 2 * C; ++c) sums[c] += partial[range * 2 * C + c];
  }
}

// sums[0..C) and sums[C..2C) in double; `vector` has one entry per channel.
template <typename T, typename Step>
void sum_channels(const T* a, const T* b, const Flat& f, const acc_t<T>* vector, double* sums, Step step) {
  if (f.channels_first) {
    sum_channels_first<T>(a, b, f, vector, sums, step);
  } else {
    sum_channels_last<T>(a, b, f, vector, sums, step);
  }
}

// ---- y = (x - mean)·p + (grad·a) + q, per channel; grad may be absent. ----

template <typename A> struct Affine { std::vector<A> mean, p, q, a; };

template <bool kTwo, typename T, typename A>
void multiply_add_run(const T* __restrict__ x, const T* __restrict__ g, T* __restrict__ y, int64_t n, A m, A p, A q, A a) {
  for (int64_t i = 0; i < n; ++i) {
    A value = (load(x + i) - m) * p + q;
    if (kTwo) value += load(g + i) * a;
    store(y + i, value);
  }
}

template <bool kTwo, typename T, typename A>
void multiply_add_row(
    const T* __restrict__ x, const T* __restrict__ g, T* __restrict__ y, int64_t C, const A* __restrict__ m,
    const A* __restrict__ p, const A* __restrict__ q, const A* __restrict__ a) {
  for (int64_t c = 0; c < C; ++c) {
    A value = (load(x + c) - m[c]) * p[c] + q[c];
    if (kTwo) value += load(g + c) * a[c];
    store(y + c, value);
  }
}

template <bool kTwo, typename T>
void multiply_add(const T* x, const T* g, T* y, const Flat& f, const Affine<acc_t<T>>& v) {
  using A = acc_t<T>;
  const int64_t C = f.channels;
  const A *mean = v.mean.data(), *p = v.p.data(), *q = v.q.data(), *a = v.a.data();
  const int64_t rows = f.channels_first ? f.outer * C : f.outer;
  const int64_t row = f.channels_first ? f.inner : C;
  const int64_t grain = std::max<int64_t>(1, kUnit / std::max<int64_t>(row, 1));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t o = r * row, c = r % C;
      const T* gr = kTwo ? g + o : nullptr;
      if (f.channels_first) {
        multiply_add_run<kTwo, T, A>(x + o, gr, y + o, row, mean[c], p[c], q[c], kTwo ? a[c] : A(0));
      } else {
        multiply_add_row<kTwo, T, A>(x + o, gr, y + o, C, mean, p, q, a);
      }
    }
  });
}

// ---- The operators. ----

Tensor batch_moments(const Tensor& x) {
  const Flat f = flat_of(x);
  const int64_t C = f.channels;
  const double count = static_cast<double>(x.numel() / C);
  Tensor out = at::empty({2, C}, x.options().dtype(at::kDouble));
  double* mean = out.data_ptr<double>();
  double* m2 = mean + C;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::batch_moments", [&] {
    using A = acc_t<scalar_t>;
    const scalar_t* data = x.const_data_ptr<scalar_t>();
    std::vector<A> pivot(C);
    for (int64_t c = 0; c < C; ++c) {  // any value of the channel starts; a few make it a better guess
      const int64_t n = std::min<int64_t>(f.channels_first ? f.inner : f.outer, 16), stride = f.channels_first ? 1 : C;
      const scalar_t* start = data + c * (f.channels_first ? f.inner : 1);
      A sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += load(start + i * stride);
      pivot[c] = sum / static_cast<A>(n);
    }
    std::vector<double> sums(2 * C);
    auto deviations = [](auto& first, auto& second, const auto& value, const auto&, A shift) {
      const auto d = value - shift;
      first += d;
      second += d * d;
    };
    for (int pass = 0; pass < 2; ++pass) {
      sum_channels<scalar_t>(data, data, f, pivot.data(), sums.data(), deviations);
      bool exact = true;
      for (int64_t c = 0; c < C; ++c) {
        const double shift = sums[c] / count;
        mean[c] = static_cast<double>(pivot[c]) + shift;
        m2[c] = std::max(0.0, sums[C + c] - sums[c] * shift);
        if (shift * shift * count > kSafeShift * m2[c] && shift != 0.0) exact = false;
      }
      if (exact) break;
      // A pivot far from its mean would cost digits: once more, about the means just found.
      for (int64_t c = 0; c < C; ++c) pivot[c] = static_cast<A>(mean[c]);
    }
  });
  return out;
}

Tensor batch_normalize(
    const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight, const OptTensor& bias) {
  const Flat f = flat_of(x);
  const int64_t C = f.channels;
  const OptTensor w = as_double(weight), b = as_double(bias);
  const double *wp = data_or_null<double>(w), *bp = data_or_null<double>(b);
  const double *mp = mean.const_data_ptr<double>(), *sp = rstd.const_data_ptr<double>();
  Tensor y = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::batch_normalize", [&] {
    using A = acc_t<scalar_t>;
    Affine<A> v{std::vector<A>(C), std::vector<A>(C), std::vector<A>(C), {}};
    for (int64_t c = 0; c < C; ++c) {
      const double scale = sp[c] * (wp ? wp[c] : 1.0);
      v.mean[c] = static_cast<A>(mp[c]);
      v.p[c] = static_cast<A>(scale);
      // What rounding took from the mean is returned through the shift.
      v.q[c] = static_cast<A>((bp ? bp[c] : 0.0) + (static_cast<double>(v.mean[c]) - mp[c]) * scale);
    }
    multiply_add<false, scalar_t>(x.const_data_ptr<scalar_t>(), nullptr, y.data_ptr<scalar_t>(), f, v);
  });
  return y;
}

Tensor batch_backward_reduce(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd) {
  const Flat f = flat_of(x);
  flat_of(grad);
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(), "grad and x must be alike");
  const int64_t C = f.channels;
  const double *mp = mean.const_data_ptr<double>(), *sp = rstd.const_data_ptr<double>();
  Tensor out = at::empty({2, C}, x.options().dtype(at::kDouble));
  double* sums = out.data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::batch_backward_reduce", [&] {
    using A = acc_t<scalar_t>;
    std::vector<A> m(C);
    for (int64_t c = 0; c < C; ++c) m[c] = static_cast<A>(mp[c]);
    auto products = [](auto& first, auto& second, const auto& g, const auto& value, A centre) {
      first += g;
      second += g * (value - centre);
    };
    sum_channels<scalar_t>(grad.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(), f, m.data(), sums, products);
    for (int64_t c = 0; c < C; ++c) {
      sums[C + c] = (sums[C + c] - (mp[c] - static_cast<double>(m[c])) * sums[c]) * sp[c];
    }
  });
  return out;
}

Tensor batch_backward_input(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight,
    const Tensor& means) {
  const Flat f = flat_of(x);
  flat_of(grad);
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type(), "grad and x must be alike");
  const int64_t C = f.channels;
  const OptTensor w = as_double(weight);
  const double *wp = data_or_null<double>(w), *mp = mean.const_data_ptr<double>(), *sp = rstd.const_data_ptr<double>();
  const Tensor means_contiguous = means.contiguous();
  const double* gp = means_contiguous.const_data_ptr<double>();
  Tensor dx = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::batch_backward_input", [&] {
    using A = acc_t<scalar_t>;
    Affine<A> v{std::vector<A>(C), std::vector<A>(C), std::vector<A>(C), std::vector<A>(C)};
    for (int64_t c = 0; c < C; ++c) {
      const double scale = sp[c] * (wp ? wp[c] : 1.0), slope = -scale * sp[c] * gp[C + c];
      v.mean[c] = static_cast<A>(mp[c]);
      v.p[c] = static_cast<A>(slope);
      v.q[c] = static_cast<A>(-scale * gp[c] + (static_cast<double>(v.mean[c]) - mp[c]) * slope);
      v.a[c] = static_cast<A>(scale);
    }
    multiply_add<true, scalar_t>(
        x.const_data_ptr<scalar_t>(), grad.const_data_ptr<scalar_t>(), dx.data_ptr<scalar_t>(), f, v);
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(syncnorm, m) {
  m.def("batch_moments(Tensor x) -> Tensor");
  m.def("batch_normalize(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias) -> Tensor");
  m.def("batch_backward_reduce(Tensor grad, Tensor x, Tensor mean, Tensor rstd) -> Tensor");
  m.def("batch_backward_input(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor means) -> Tensor");
}

TORCH_LIBRARY_IMPL(syncnorm, CPU, m) {
  m.impl("batch_moments", batch_moments);
  m.impl("batch_normalize", batch_normalize);
  m.impl("batch_backward_reduce", batch_backward_reduce);
  m.impl("batch_backward_input", batch_backward_input);
}
