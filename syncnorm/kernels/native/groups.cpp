// Group norm on CPU, with an activation. A group is a run of memory where channels come first, and a block of columns where
// they are innermost; either way a sample is read from memory once and found in cache for what follows.
//
// Sums over the samples are added in their order, so gradients of the parameters do not depend on the number of threads.

#include "group_columns.h"
#include "group_runs.h"

namespace syncnorm {
namespace {

// Space below which a group is taken as one row, with the parameters repeated over space.
constexpr int64_t kSmallSpace = 24;

// ---- Small spaces: groups as rows. ----

// Calls f(group of channels, its row in the tensors) so that rows are the samples.
template <typename T> ForwardRows<T> forward_rows_of(const Arguments<T>& f, const Groups& s, int64_t g) {
  const int64_t size = s.D * s.S, o = g * size;
  return {f.x + o, nullptr, f.out + o, nullptr, f.weight + o, f.bias + o, f.mean + g, f.rstd + g, size, size, s.G * size, s.G,
          f.eps, s.stream, f.activation};
}

template <typename T> BackwardRows<T> backward_rows_of(const Arguments<T>& f, const Groups& s, int64_t g) {
  const int64_t size = s.D * s.S, o = g * size;
  return {f.grad + o, f.x + o, nullptr, f.out + o, f.weight + o, f.bias + o, f.mean + g, f.rstd + g, size, size, s.G * size,
          s.G, s.stream, f.activation};
}

// Adds the gradients of bias and weight to total [2, C].
template <Shape kShape, typename T> void backward_small(const Arguments<T>& f, const Groups& s, std::vector<double>& total) {
  using A = acc_t<T>;
  const int64_t size = s.D * s.S, width = (size + kLanes - 1) / kLanes * kLanes;
  const int64_t rows = std::clamp<int64_t>(4 * kUnit / size, 16, 256), ranges = (s.N + rows - 1) / rows;
  std::vector<A> sums(ranges * s.G * 2 * width, A(0));
  at::parallel_for(0, ranges * s.G, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      A* mine = sums.data() + unit * 2 * width;
      const int64_t r = unit / s.G * rows;
      backward_rows<true, true, true, kShape>(
          backward_rows_of(f, s, unit % s.G), r, std::min(s.N, r + rows), mine, mine + width);
    }
  });
  for (int64_t unit = 0; unit < ranges * s.G; ++unit) {
    const A *weight = sums.data() + unit * 2 * width, *bias = weight + width;
    for (int64_t k = 0; k < s.D; ++k, weight += s.S, bias += s.S) {
      double of_bias = 0, of_weight = 0;
#pragma omp simd reduction(+ : of_bias, of_weight)
      for (int64_t j = 0; j < s.S; ++j) of_bias += bias[j], of_weight += weight[j];
      total[unit % s.G * s.D + k] += of_bias, total[s.C + unit % s.G * s.D + k] += of_weight;
    }
  }
}

// ---- The operators. ----

Groups groups_of(const Tensor& x, int64_t num_groups) {
  TORCH_CHECK(x.dim() == 3, "expected [N, C, S], got ", x.sizes());
  const int64_t C = x.size(1);
  TORCH_CHECK(num_groups > 0 && C % num_groups == 0, "expected a divisor of ", C, " for groups, got ", num_groups);
  const bool inner = !x.is_contiguous();
  TORCH_CHECK(!inner || x.transpose(1, 2).is_contiguous(), "expected a contiguous tensor, or one with channels innermost");
  return {x.size(0), C, x.size(2), num_groups, C / num_groups, inner, streams(inner ? x.transpose(1, 2) : x)};
}

// Calls f(n, work) for each sample: in parallel, or one after the other if they are few, and parallel within.
template <typename A, typename F> void each_sample(const Groups& s, F f) {
  auto run = [&](int64_t begin, int64_t end) {
    Workspace<A> work(s);
    for (int64_t n = begin; n < end; ++n) f(n, work);
  };
  if (s.N < at::get_num_threads()) {
    run(0, s.N);
  } else {
    at::parallel_for(0, s.N, 1, run);
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

// Weight and bias in the dtype of the arithmetic, per channel; in small spaces per element.
template <typename A> struct Parameters {
  std::vector<A> weight, bias;
  Parameters(const Groups& s, const OptTensor& weight, const OptTensor& bias, int64_t repeat)
      : weight(spread(values_of<A>(weight, s.C, 1), repeat)), bias(spread(values_of<A>(bias, s.C, 0), repeat)) {}
  static std::vector<A> spread(std::vector<A> values, int64_t repeat) {
    if (repeat == 1) return values;
    std::vector<A> spread;
    spread.reserve(values.size() * repeat);
    for (const A value : values) spread.insert(spread.end(), repeat, value);
    return spread;
  }
};

std::tuple<Tensor, Tensor, Tensor> group_norm_forward(
    const Tensor& x, int64_t num_groups, const OptTensor& weight, const OptTensor& bias, double eps, int64_t activation,
    double slope) {
  const Groups s = groups_of(x, num_groups);
  const Activation act(activation, slope);
  const auto accumulate = x.options().dtype(accumulate_type(x));
  const bool small = !s.inner && s.S < kSmallSpace;
  Tensor y = at::empty_like(x), mean = at::empty({s.N, s.G}, accumulate), rstd = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::group_norm_forward", [&] {
    using A = acc_t<scalar_t>;
    const Parameters<A> parameters(s, weight, bias, small ? s.S : 1);
    const Arguments<scalar_t> f{
        nullptr, x.const_data_ptr<scalar_t>(), y.data_ptr<scalar_t>(), mean.data_ptr<A>(), rstd.data_ptr<A>(),
        parameters.weight.data(), parameters.bias.data(), eps, Activated<A>(act)};
    with_shape(act.shape(), [&](auto shape) {
      if (s.inner) {
        each_sample<A>(s, [&](int64_t n, auto& work) { forward_sample<shape>(f, s, n, work); });
      } else if (small) {
        each_group(s, [&](int64_t group) {
          forward_rows<true, true, true, shape>(forward_rows_of(f, s, group % s.G), group / s.G, group / s.G + 1);
        });
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
  const bool small = !s.inner && s.S < kSmallSpace;
  Tensor dx = at::empty_like(x), dweight = at::empty({s.C}, mean.options()), dbias = at::empty_like(dweight);
  std::vector<double> total(2 * s.C, 0.0);  // dbias and dweight
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::group_norm_backward", [&] {
    using A = acc_t<scalar_t>;
    const Parameters<A> parameters(s, weight, bias, small ? s.S : 1);
    const Arguments<scalar_t> f{
        grad.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(), dx.data_ptr<scalar_t>(), mean.data_ptr<A>(),
        rstd.data_ptr<A>(), parameters.weight.data(), parameters.bias.data(), 0, Activated<A>(act)};
    with_shape(act.shape(), [&](auto shape) {
      if (small) {
        backward_small<shape>(f, s, total);
      } else {
        std::vector<double> shares(s.N * s.C * 2);  // of each sample
        auto of_channel = [&](int64_t n, int64_t c) {
          double* first = shares.data() + 2 * n * s.C + c;
          return Shares{first, first + s.C};
        };
        if (s.inner) {
          each_sample<A>(s, [&](int64_t n, auto& work) { backward_sample<shape>(f, s, n, of_channel(n, 0), work); });
        } else {
          each_group(s, [&](int64_t group) {
            backward_group<shape>(f, s, group, of_channel(group / s.G, group % s.G * s.D));
          });
        }
        for (int64_t n = 0; n < s.N; ++n) {
          for (int64_t i = 0; i < 2 * s.C; ++i) total[i] += shares[n * 2 * s.C + i];
        }
      }
    });
    std::copy_n(total.data(), s.C, dbias.data_ptr<A>());
    std::copy_n(total.data() + s.C, s.C, dweight.data_ptr<A>());
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
