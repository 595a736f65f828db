// Group norm on CPU, with an activation. A group is a run of memory where channels come first, and a block of columns where
// they are innermost; either way a sample is read from memory once and found in cache for what follows.
//
// Sums over the samples are added in their order, so gradients of the parameters do not depend on the number of threads.

#include "activation.h"
#include "rows.h"

namespace syncnorm {
namespace {

// Rows of a channels-innermost sample that are added up in registers, and in float32 before double takes over.
constexpr int64_t kTogether = 4;
constexpr int64_t kTerms = 64;

// Samples from which work is cut by samples alone: then a sample's second pass finds it in cache.
constexpr int64_t kSamples = 16;

// N samples of C channels in G groups of D, S values each.
struct Groups {
  int64_t N, C, S, G, D;
  bool inner;   // [N, S, C] in memory, else [N, C, S]
  bool stream;  // outputs bypass the caches
};

// What one element needs: pre = (x - mean)·scale + offset.
template <typename A> struct Affine { A mean, scale, offset; };

// Statistics of a group: the mean as it is subtracted, what it lacks to the true one, and 1 / sqrt(var + eps).
struct Statistics { double mean, lack, rstd; };

template <typename A> Affine<A> affine_of(const Statistics& s, double weight, double bias) {
  const double scale = s.rstd * weight;
  return {static_cast<A>(s.mean), static_cast<A>(scale), static_cast<A>(bias - s.lack * scale)};
}

template <typename A> Statistics statistics_of(double mean, double var, double eps) {
  const double held = static_cast<double>(static_cast<A>(mean));
  return {held, mean - held, 1 / std::sqrt(var + eps)};
}

// dx = g'·scale + (x - mean)·slope + offset.
template <typename A> struct Gradient { A scale, slope, offset; };

// Of a group: the coefficients b and a of dx = rstd·((u - a) - d·b), from Σu, Σu·d and Σd over n values, d = x - mean.
struct Slopes {
  double a, b, rstd;
  Slopes(double u, double ud, double d, double rstd, double n)
      : b((ud - d / n * u) * rstd * rstd / n), rstd(rstd) { a = u / n - d / n * b; }
  template <typename A> Gradient<A> gradient(double weight) const {
    return {static_cast<A>(weight * rstd), static_cast<A>(-b * rstd), static_cast<A>(-a * rstd)};
  }
};

template <typename T> struct Arguments {
  using A = acc_t<T>;
  const T *grad, *x;
  T* out;
  A *mean, *rstd;
  std::vector<double> weight, bias;
  double eps;
  Activated<A> activation;
};

// ---- Channels first: runs. ----

template <Shape kShape, typename T> void normalize_run(
    const Arguments<T>& f, const T* x, T* y, int64_t n, Affine<acc_t<T>> a, bool stream, int64_t ahead) {
  const auto mean = splat(a.mean), scale = splat(a.scale), offset = splat(a.offset);
  columns(0, n, [&](int64_t i, auto part) {
    __builtin_prefetch(x + i + ahead, 0, 3);
    part.store(y + i, f.activation.template apply<kShape>((part.load(x + i) - mean) * scale + offset), stream);
  });
}

template <Shape kShape, typename T> void forward_run(const Arguments<T>& f, const Groups& s, int64_t group) {
  using A = acc_t<T>;
  const int64_t size = s.D * s.S, o = group * size, first = group % s.G * s.D;
  double mean, var;
  moments_of(f.x + o, size, mean, var);
  const Statistics statistics = statistics_of<A>(mean, var, f.eps);
  for (int64_t c = 0; c < s.D; ++c) {
    const auto affine = affine_of<A>(statistics, f.weight[first + c], f.bias[first + c]);
    normalize_run<kShape>(f, f.x + o + c * s.S, f.out + o + c * s.S, s.S, affine, s.stream, size);
  }
  f.mean[group] = static_cast<A>(mean);
  f.rstd[group] = static_cast<A>(statistics.rstd);
}

// Σg', Σg'·d and Σd of a run.
struct RunSums { double g = 0, gd = 0, d = 0; };

template <Shape kShape, typename T> RunSums reduce_run(
    const Arguments<T>& f, const T* grad, const T* x, int64_t n, Affine<acc_t<T>> a) {
  using A = acc_t<T>;
  const auto mean = splat(a.mean), scale = splat(a.scale), offset = splat(a.offset);
  RunSums sums;
  for (int64_t start = 0; start < n; start += kRun) {
    const int64_t stop = std::min(n, start + kRun);
    vec_t<A> g[2] = {}, gd[2] = {}, d[2] = {};
    auto step = [&](int64_t i, auto part, int64_t k) {
      const vec_t<A> v = part.keep(part.load(x + i) - mean);
      const vec_t<A> slope = f.activation.template backward<kShape>(part.load(grad + i), v * scale + offset);
      g[k] += slope, gd[k] += slope * v, d[k] += v;
    };
    int64_t i = start;
    for (; i + 2 * kLanes <= stop; i += 2 * kLanes) step(i, Whole(), 0), step(i + kLanes, Whole(), 1);
    columns(i, stop, [&](int64_t at, auto part) { step(at, part, 0); });
    sums.g += fold<A>(g[0] + g[1]), sums.gd += fold<A>(gd[0] + gd[1]), sums.d += fold<A>(d[0] + d[1]);
  }
  return sums;
}

template <Shape kShape, typename T> void backward_run(
    const Arguments<T>& f, const T* grad, const T* x, T* dx, int64_t n, Affine<acc_t<T>> a, Gradient<acc_t<T>> b, bool stream, int64_t ahead) {
  const auto mean = splat(a.mean), scale = splat(a.scale), offset = splat(a.offset);
  const auto b_scale = splat(b.scale), b_slope = splat(b.slope), b_offset = splat(b.offset);
  columns(0, n, [&](int64_t i, auto part) {
    __builtin_prefetch(x + i + ahead, 0, 3);
    __builtin_prefetch(grad + i + ahead, 0, 3);
    const auto d = part.load(x + i) - mean;
    const auto g = f.activation.template backward<kShape>(part.load(grad + i), d * scale + offset);
    part.store(dx + i, g * b_scale + (d * b_slope + b_offset), stream);
  });
}

// One group; its channels' shares of dbias and dweight into `shares`.
template <Shape kShape, typename T> void backward_group(const Arguments<T>& f, const Groups& s, int64_t group, double* shares) {
  using A = acc_t<T>;
  const int64_t size = s.D * s.S, o = group * size, first = group % s.G * s.D;
  const Statistics statistics{f.mean[group], 0, f.rstd[group]};
  double u = 0, ud = 0, d = 0;
  for (int64_t c = 0; c < s.D; ++c) {
    const double weight = f.weight[first + c];
    const auto affine = affine_of<A>(statistics, weight, f.bias[first + c]);
    const RunSums sums = reduce_run<kShape>(f, f.grad + o + c * s.S, f.x + o + c * s.S, s.S, affine);
    u += weight * sums.g, ud += weight * sums.gd, d += sums.d;
    shares[2 * c] = sums.g, shares[2 * c + 1] = sums.gd;
  }
  const double lack = d / size;  // the mean was rounded
  for (int64_t c = 0; c < s.D; ++c) shares[2 * c + 1] = (shares[2 * c + 1] - lack * shares[2 * c]) * statistics.rstd;
  const Slopes slopes(u, ud, d, statistics.rstd, size);
  for (int64_t c = 0; c < s.D; ++c) {
    const int64_t at = o + c * s.S;
    const double weight = f.weight[first + c];
    const auto affine = affine_of<A>(statistics, weight, f.bias[first + c]);
    backward_run<kShape>(f, f.grad + at, f.x + at, f.out + at, s.S, affine, slopes.gradient<A>(weight), s.stream, size);
  }
}

// ---- Channels innermost: columns. ----

// Vectors of entries per channel, each padded to whole vectors of lanes.
template <typename A> struct Table {
  int64_t width;
  std::vector<A> values;
  Table(int64_t rows, int64_t C) : width((C + kLanes - 1) / kLanes * kLanes), values(rows * width) {}
  A* operator[](int64_t row) { return values.data() + row * width; }
};

// Rows of a sample are cut into ranges, for threads where samples are few.
struct Ranges {
  int64_t S, rows;
  explicit Ranges(const Groups& s) : S(s.S), rows(std::max(kTerms, 2 * kUnit / s.C)) {}
  int64_t count() const { return (S + rows - 1) / rows; }
  template <typename F> void each(F f) const {  // within a parallel region it is a loop
    at::parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) f(r, r * rows, std::min(S, (r + 1) * rows));
    });
  }
};

// step(part, element, column, k) for kTogether rows or fewer, k being their number: the columns' vectors are loaded once.
template <typename Before, typename Step, typename After>
inline void visit_rows(int64_t C, int64_t at, int64_t rows, Before before, Step step, After after) {
  columns(0, C, [&](int64_t i, auto part) {
    auto state = before(i, part);
    if (rows == kTogether) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < kTogether; ++k) step(state, at + k * C + i, part);
    } else {
      for (int64_t k = 0; k < rows; ++k) step(state, at + k * C + i, part);
    }
    after(state, i);
  });
}

template <typename A, int K> struct Totals { vec_t<A> sum[K]; };

// Adds up K terms of each element of the sample that begins at `origin`, per channel. terms(element, column, part, out) sets them.
template <int K, typename A, typename Terms>
Table<double> sum_columns(const Groups& s, int64_t origin, Terms terms) {
  const Ranges ranges(s);
  Table<double> partial(ranges.count() * K, s.C);
  ranges.each([&](int64_t range, int64_t begin, int64_t end) {
    Table<A> block(K, s.C);
    for (int64_t start = begin; start < end; start += kTerms) {
      const int64_t stop = std::min(end, start + kTerms);
      std::fill(block.values.begin(), block.values.end(), A(0));
      for (int64_t r = start; r < stop; r += kTogether) {
        visit_rows(
            s.C, origin + r * s.C, std::min(kTogether, stop - r),
            [&](int64_t i, auto) {
              Totals<A, K> totals;
              for (int k = 0; k < K; ++k) totals.sum[k] = load(block[k] + i);
              return std::pair(totals, i);
            },
            [&](auto& state, int64_t at, auto part) {
              vec_t<A> out[K];
              terms(at, state.second, part, out);
              for (int k = 0; k < K; ++k) state.first.sum[k] += out[k];
            },
            [&](auto& state, int64_t i) {
              for (int k = 0; k < K; ++k) store(block[k] + i, state.first.sum[k]);
            });
      }
      for (int k = 0; k < K; ++k) {
        double* mine = partial[range * K + k];
        for (int64_t c = 0; c < s.C; ++c) mine[c] += block[k][c];
      }
    }
  });
  for (int64_t row = K; row < ranges.count() * K; ++row) {
    for (int64_t c = 0; c < s.C; ++c) partial[row % K][c] += partial[row][c];
  }
  return partial;
}

template <Shape kShape, typename T> void forward_sample(const Arguments<T>& f, const Groups& s, int64_t n) {
  using A = acc_t<T>;
  const int64_t origin = n * s.S * s.C, size = s.D * s.S;
  std::vector<double> mean(s.G), var(s.G);
  Table<A> vectors(3, s.C);  // mean or pivot, scale, offset
  for (int64_t c = 0; c < s.C; ++c) vectors[0][c] = static_cast<A>(f.x[origin + s.S / 2 * s.C + c / s.D * s.D]);
  for (int pass = 0; pass < 2; ++pass) {
    const A* pivot = vectors[0];
    auto sums = sum_columns<2, A>(s, origin, [&](int64_t at, int64_t i, auto part, vec_t<A>* out) {
      out[0] = part.keep(part.load(f.x + at) - load(pivot + i));
      out[1] = out[0] * out[0];
    });
    bool exact = true;
    for (int64_t g = 0; g < s.G; ++g) {
      double first = 0, second = 0;
      for (int64_t c = g * s.D; c < (g + 1) * s.D; ++c) first += sums[0][c], second += sums[1][c];
      const double shift = first / size;
      mean[g] = static_cast<double>(pivot[g * s.D]) + shift;
      var[g] = std::max(0.0, second / size - shift * shift);
      exact = exact && !(shift * shift > kSafeShift * var[g]);
    }
    if (exact) break;
    for (int64_t c = 0; c < s.C; ++c) vectors[0][c] = static_cast<A>(mean[c / s.D]);
  }
  for (int64_t g = 0; g < s.G; ++g) {
    const Statistics statistics = statistics_of<A>(mean[g], var[g], f.eps);
    for (int64_t c = g * s.D; c < (g + 1) * s.D; ++c) {
      const auto affine = affine_of<A>(statistics, f.weight[c], f.bias[c]);
      vectors[0][c] = affine.mean, vectors[1][c] = affine.scale, vectors[2][c] = affine.offset;
    }
    f.mean[n * s.G + g] = static_cast<A>(mean[g]);
    f.rstd[n * s.G + g] = static_cast<A>(statistics.rstd);
  }
  const A *mean_C = vectors[0], *scale_C = vectors[1], *offset_C = vectors[2];
  Ranges(s).each([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r += kTogether) {
      visit_rows(
          s.C, origin + r * s.C, std::min(kTogether, end - r),
          [&](int64_t i, auto) { return std::tuple(load(mean_C + i), load(scale_C + i), load(offset_C + i)); },
          [&](auto& v, int64_t at, auto part) {
            __builtin_prefetch(f.x + at + s.S * s.C, 0, 3);
            const auto pre = (part.load(f.x + at) - std::get<0>(v)) * std::get<1>(v) + std::get<2>(v);
            part.store(f.out + at, f.activation.template apply<kShape>(pre), s.stream);
          },
          [](auto&, int64_t) {});
    }
  });
}

template <Shape kShape, typename T> void backward_sample(const Arguments<T>& f, const Groups& s, int64_t n, double* shares) {
  using A = acc_t<T>;
  const int64_t origin = n * s.S * s.C, size = s.D * s.S;
  Table<A> vectors(6, s.C);
  const A *mean_C = vectors[0], *scale_C = vectors[1], *offset_C = vectors[2];
  const A *g_scale_C = vectors[3], *slope_C = vectors[4], *shift_C = vectors[5];
  for (int64_t c = 0; c < s.C; ++c) {
    const int64_t group = n * s.G + c / s.D;
    const auto affine = affine_of<A>({f.mean[group], 0, f.rstd[group]}, f.weight[c], f.bias[c]);
    vectors[0][c] = affine.mean, vectors[1][c] = affine.scale, vectors[2][c] = affine.offset;
  }
  auto sums = sum_columns<3, A>(s, origin, [&](int64_t at, int64_t i, auto part, vec_t<A>* out) {
    const vec_t<A> d = part.keep(part.load(f.x + at) - load(mean_C + i));
    out[0] = f.activation.template backward<kShape>(part.load(f.grad + at), d * load(scale_C + i) + load(offset_C + i));
    out[1] = out[0] * d;
    out[2] = d;
  });
  for (int64_t g = 0; g < s.G; ++g) {
    double u = 0, ud = 0, d = 0;
    for (int64_t c = g * s.D; c < (g + 1) * s.D; ++c) {
      u += f.weight[c] * sums[0][c], ud += f.weight[c] * sums[1][c], d += sums[2][c];
    }
    const double rstd = f.rstd[n * s.G + g], lack = d / size;  // the mean was rounded
    const Slopes slopes(u, ud, d, rstd, size);
    for (int64_t c = g * s.D; c < (g + 1) * s.D; ++c) {
      shares[2 * c] = sums[0][c], shares[2 * c + 1] = (sums[1][c] - lack * sums[0][c]) * rstd;
      const auto gradient = slopes.template gradient<A>(f.weight[c]);
      vectors[3][c] = gradient.scale, vectors[4][c] = gradient.slope, vectors[5][c] = gradient.offset;
    }
  }
  Ranges(s).each([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r += kTogether) {
      visit_rows(
          s.C, origin + r * s.C, std::min(kTogether, end - r), [&](int64_t i, auto) { return i; },
          [&](int64_t i, int64_t at, auto part) {
            __builtin_prefetch(f.x + at + s.S * s.C, 0, 3);
            __builtin_prefetch(f.grad + at + s.S * s.C, 0, 3);
            const vec_t<A> v = part.load(f.x + at) - load(mean_C + i);
            const vec_t<A> g =
                f.activation.template backward<kShape>(part.load(f.grad + at), v * load(scale_C + i) + load(offset_C + i));
            part.store(f.out + at, g * load(g_scale_C + i) + (v * load(slope_C + i) + load(shift_C + i)), s.stream);
          },
          [](auto&, int64_t) {});
    }
  });
}

// ---- The operators. ----

Groups groups_of(const Tensor& x, int64_t num_groups) {
  TORCH_CHECK(x.dim() == 3, "expected [N, C, S], got ", x.sizes());
  const int64_t C = x.size(1);
  TORCH_CHECK(num_groups > 0 && C % num_groups == 0, "expected a divisor of ", C, " for groups, got ", num_groups);
  // Where there is one value per channel, both layouts are one, and columns are the longer runs.
  const bool inner = x.size(2) == 1 || !x.is_contiguous();
  TORCH_CHECK(!inner || x.transpose(1, 2).is_contiguous(), "expected a contiguous tensor, or one with channels innermost");
  return {x.size(0), C, x.size(2), num_groups, C / num_groups, inner, streams(inner ? x.transpose(1, 2) : x)};
}

// Calls f(n) for each sample: in parallel, or one after the other if they are few, and parallel within.
template <typename F> void each_sample(const Groups& s, F f) {
  if (s.N < at::get_num_threads()) {
    for (int64_t n = 0; n < s.N; ++n) f(n);
  } else {
    at::parallel_for(0, s.N, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) f(n);
    });
  }
}

template <typename F> void each_group(const Groups& s, F f) {
  at::parallel_for(0, s.N * s.G, std::max<int64_t>(1, kUnit / (s.D * s.S)), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) f(group);
    if (s.stream) end_streaming();
  });
}

template <typename F> void with_shape(Shape shape, F f) {
  with_flags(
      [&](auto smooth, auto piecewise) {
        f(std::integral_constant<Shape, smooth ? Shape::kSmooth : piecewise ? Shape::kPiecewise : Shape::kNone>());
      },
      shape == Shape::kSmooth, shape == Shape::kPiecewise);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_forward(
    const Tensor& x, int64_t num_groups, const OptTensor& weight, const OptTensor& bias, double eps, int64_t activation,
    double slope) {
  const Groups s = groups_of(x, num_groups);
  const Activation act(activation, slope);
  Tensor y = at::empty_like(x);
  Tensor mean = at::empty({s.N, s.G}, x.options().dtype(accumulate_type(x))), rstd = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::group_norm_forward", [&] {
    using A = acc_t<scalar_t>;
    const Arguments<scalar_t> f{
        nullptr, x.const_data_ptr<scalar_t>(), y.data_ptr<scalar_t>(), mean.data_ptr<A>(), rstd.data_ptr<A>(),
        values_of(weight, s.C, 1), values_of(bias, s.C, 0), eps, Activated<A>(act)};
    with_shape(act.shape(), [&](auto shape) {
      if (s.inner) {
        each_sample(s, [&](int64_t n) { forward_sample<shape>(f, s, n); });
      } else {
        each_group(s, [&](int64_t group) { forward_run<shape>(f, s, group); });
      }
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_backward(
    const Tensor& grad, const Tensor& x, int64_t num_groups, const OptTensor& weight, const OptTensor& bias, const Tensor& mean,
    const Tensor& rstd, int64_t activation, double slope) {
  const Groups s = groups_of(x, num_groups);
  TORCH_CHECK(
      grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() && groups_of(grad, num_groups).inner == s.inner,
      "grad must be laid out like x");
  const Activation act(activation, slope);
  Tensor dx = at::empty_like(x), dweight = at::empty({s.C}, mean.options()), dbias = at::empty_like(dweight);
  std::vector<double> shares(s.N * s.C * 2);  // of each sample and channel in dbias and dweight
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::group_norm_backward", [&] {
    using A = acc_t<scalar_t>;
    const Arguments<scalar_t> f{
        grad.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(), dx.data_ptr<scalar_t>(), mean.data_ptr<A>(),
        rstd.data_ptr<A>(), values_of(weight, s.C, 1), values_of(bias, s.C, 0), 0, Activated<A>(act)};
    with_shape(act.shape(), [&](auto shape) {
      if (s.inner) {
        each_sample(s, [&](int64_t n) { backward_sample<shape>(f, s, n, shares.data() + n * s.C * 2); });
      } else {
        each_group(s, [&](int64_t group) { backward_group<shape>(f, s, group, shares.data() + group * s.D * 2); });
      }
    });
    std::vector<double> total(2 * s.C, 0.0);
    for (int64_t n = 0; n < s.N; ++n) {
      for (int64_t i = 0; i < 2 * s.C; ++i) total[i] += shares[n * 2 * s.C + i];
    }
    for (int64_t c = 0; c < s.C; ++c) {
      dbias.data_ptr<A>()[c] = static_cast<A>(total[2 * c]);
      dweight.data_ptr<A>()[c] = static_cast<A>(total[2 * c + 1]);
    }
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace syncnorm

TORCH_LIBRARY_FRAGMENT(syncnorm, m) {
  m.def(
      "group_norm_forward(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, int activation, float slope)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_backward(Tensor grad, Tensor x, int num_groups, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
      " int activation, float slope) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(syncnorm, CPU, m) {
  m.impl("group_norm_forward", syncnorm::group_norm_forward);
  m.impl("group_norm_backward", syncnorm::group_norm_backward);
}
