// Batch normalisation backward on CPU: two sums per channel in one pass over memory, the gradients in another.
//
// What the activation was applied to is computed again from x, or its sign is read from the mask of the forward.

#include "affine.h"
#include "sums.h"

namespace syncnorm {
namespace {

// Where g' = g·act'(pre) comes from.
enum class Source { kGrad, kSignOfX, kMask, kSmooth, kSmoothWithResidual };

constexpr Mask mask_of(Source source) { return source == Source::kMask ? Mask::kRead : Mask::kNone; }

template <typename F> void with_source(Source source, F f) {
  switch (source) {
    case Source::kGrad: return f(std::integral_constant<Source, Source::kGrad>{});
    case Source::kSignOfX: return f(std::integral_constant<Source, Source::kSignOfX>{});
    case Source::kMask: return f(std::integral_constant<Source, Source::kMask>{});
    case Source::kSmooth: return f(std::integral_constant<Source, Source::kSmooth>{});
    case Source::kSmoothWithResidual: return f(std::integral_constant<Source, Source::kSmoothWithResidual>{});
  }
}

// The gradient behind the activation, at an element and its column; `bits` are those of the mask.
template <Source kSource, typename A, typename V, typename T>
inline vec_t<A> through(
    const Activated<A>& activated, const V& view, const Data<T>& from, int64_t at, int64_t i, vec_t<A> x, uint32_t bits) {
  const vec_t<A> grad = load(from.grad + at);
  if constexpr (kSource == Source::kGrad) {
    return grad;
  } else if constexpr (kSource == Source::kMask) {
    return activated.backward(grad, bits);
  } else if constexpr (kSource == Source::kSignOfX) {
    return activated.template backward<Shape::kPiecewise>(grad, pre_activation(x, view, i));
  } else if constexpr (kSource == Source::kSmooth) {
    return activated.template backward<Shape::kSmooth>(grad, pre_activation(x, view, i));
  } else {
    return activated.template backward<Shape::kSmooth>(grad, pre_activation(x, view, i) + load(from.residual + at));
  }
}

struct Inputs {
  Layout layout;
  Activation activation;
  Source source = Source::kGrad;
  const Tensor &grad, &x;
  const OptTensor& side;
  Channels channels;

  Inputs(
      const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight,
      const OptTensor& bias, int64_t function, double slope, const OptTensor& side)
      : layout(x, side && side->scalar_type() == at::kByte), activation(function, slope), grad(grad), x(x), side(side),
        channels(layout.channels, mean, rstd, weight, bias) {
    expect_like(grad, x, "grad");
    if (activation.shape() == Shape::kPiecewise) {
      source = side ? Source::kMask : Source::kSignOfX;
      TORCH_CHECK(!side || (side->scalar_type() == at::kByte && side->numel() == layout.mask_bytes), "this is not the mask of x");
    } else if (activation.shape() == Shape::kSmooth) {
      source = side ? Source::kSmoothWithResidual : Source::kSmooth;
      if (side) expect_like(*side, x, "residual");
    }
  }

  template <typename T> Data<T> data() const {
    Data<T> data;
    data.x = x.const_data_ptr<T>();
    data.grad = grad.const_data_ptr<T>();
    if (source == Source::kMask) data.mask = side->const_data_ptr<uint8_t>();
    if (source == Source::kSmoothWithResidual) data.residual = side->const_data_ptr<T>();
    return data;
  }
};

template <typename T, Source kSource, typename A>
void reduce(const Inputs& inputs, const Parameters<A, 3>& parameters, double* sums) {
  const Activated<A> activated(inputs.activation);
  sum_channels<mask_of(kSource)>(
      inputs.layout, parameters, inputs.data<T>(), sums,
      [=](const auto& view, const Data<T>& from, int64_t at, int64_t i, uint32_t bits, vec_t<A>& p, vec_t<A>& q) {
        const vec_t<A> x = load(from.x + at);
        p = through<kSource>(activated, view, from, at, i, x, bits);
        q = p * (x - view.template get<0>(i));
      });
}

Tensor batch_backward_reduce(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight,
    const OptTensor& bias, int64_t activation, double slope, const OptTensor& side) {
  const Inputs inputs(grad, x, mean, rstd, weight, bias, activation, slope, side);
  const int64_t C = inputs.layout.channels;
  Tensor out = at::empty({2, C}, x.options().dtype(at::kDouble)).zero_();
  double* sums = out.data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::batch_backward_reduce", [&] {
    using A = acc_t<scalar_t>;
    const Channels& v = inputs.channels;
    const Parameters<A, 3> parameters(inputs.layout, [&](int64_t c, A* values) { v.affine(c, values); });
    with_source(inputs.source, [&](auto source) { reduce<scalar_t, source()>(inputs, parameters, sums); });
    for (int64_t c = 0; c < C; ++c) {
      sums[C + c] = (sums[C + c] - (v.mean[c] - static_cast<double>(static_cast<A>(v.mean[c]))) * sums[c]) * v.rstd[c];
    }
  });
  return out;
}

// dx = g'·scale + (x - mean)·slope + shift, the parameters 3, 4 and 5.
template <typename T, Source kSource, bool kAcross, typename A>
void input(const Inputs& inputs, const Parameters<A, 6>& parameters, const Data<T>& data) {
  const Activated<A> activated(inputs.activation);
  const bool stream = streams<T>(inputs.layout, data.y), stream_second = streams<T>(inputs.layout, data.second);
  for_each_group<kAcross, mask_of(kSource)>(
      inputs.layout, parameters, data,
      [=](const auto& view, const Data<T>& to, int64_t group, int64_t column, uint32_t bits) {
        for (int64_t v = 0; v < kVectors; ++v) {
          const int64_t at = group + v * kLanes, i = column + v * kLanes;
          const vec_t<A> x = load(to.x + at), g = through<kSource>(activated, view, to, at, i, x, bits >> (v * kLanes));
          const vec_t<A> dx = (x - view.template get<0>(i)) * view.template get<4>(i) + view.template get<5>(i);
          store(to.y + at, g * view.template get<3>(i) + dx, stream);
          if (kSource != Source::kGrad && to.second) store(to.second + at, g, stream_second);
        }
        return 0u;
      });
}

std::tuple<Tensor, Tensor> input_and_residual(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight,
    const OptTensor& bias, const Tensor& means, int64_t activation, double slope, const OptTensor& side,
    bool needs_residual) {
  const Inputs inputs(grad, x, mean, rstd, weight, bias, activation, slope, side);
  const int64_t C = inputs.layout.channels;
  const std::vector<double> mean_of = values_of(means, 2 * C, 0);
  Tensor dx = at::empty_like(x), dresidual;
  if (needs_residual) {
    TORCH_CHECK(inputs.source != Source::kGrad, "without an activation the gradient of the residual is grad itself");
    dresidual = at::empty_like(x);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::batch_backward_input", [&] {
    using A = acc_t<scalar_t>;
    const Channels& v = inputs.channels;
    const Parameters<A, 6> parameters(inputs.layout, [&](int64_t c, A* values) {
      v.affine(c, values);
      const double scale = v.scale(c), slope = -scale * v.rstd[c] * mean_of[C + c];
      values[3] = static_cast<A>(scale);
      values[4] = static_cast<A>(slope);
      values[5] = static_cast<A>((static_cast<double>(values[0]) - v.mean[c]) * slope - scale * mean_of[c]);
    });
    Data<scalar_t> data = inputs.data<scalar_t>();
    data.y = dx.data_ptr<scalar_t>();
    if (needs_residual) data.second = dresidual.data_ptr<scalar_t>();
    with_constant<bool>(inputs.layout.across, [&](auto across) {
      with_source(inputs.source, [&](auto source) { input<scalar_t, source(), across()>(inputs, parameters, data); });
    });
  });
  return {dx, dresidual};
}

Tensor batch_backward_input(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight,
    const OptTensor& bias, const Tensor& means, int64_t activation, double slope, const OptTensor& side) {
  return std::get<0>(
      input_and_residual(grad, x, mean, rstd, weight, bias, means, activation, slope, side, false));
}

std::tuple<Tensor, Tensor> batch_backward_input_and_residual(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight,
    const OptTensor& bias, const Tensor& means, int64_t activation, double slope, const OptTensor& side) {
  return input_and_residual(grad, x, mean, rstd, weight, bias, means, activation, slope, side, true);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(syncnorm, m) {
  m.def(
      "batch_backward_reduce(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
      "int activation, float slope, Tensor? side) -> Tensor");
  m.def(
      "batch_backward_input(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
      "Tensor means, int activation, float slope, Tensor? side) -> Tensor");
  m.def(
      "batch_backward_input_and_residual(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
      "Tensor means, int activation, float slope, Tensor? side) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(syncnorm, CPU, m) {
  m.impl("batch_backward_reduce", batch_backward_reduce);
  m.impl("batch_backward_input", batch_backward_input);
  m.impl("batch_backward_input_and_residual", batch_backward_input_and_residual);
}

}  // namespace syncnorm
