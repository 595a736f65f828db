// Batch normalisation backward on CPU: two sums per channel in one pass over memory, the gradients in another.
//
// What the activation was applied to is computed again from x, or its sign is read from the mask of the forward.

#include "affine.h"
#include "operators.h"
#include "slabs.h"
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
  std::vector<Layout> chunks;
  Activation activation;
  Source source = Source::kGrad;
  const Tensor &grad, &x;
  const OptTensor& side;
  Channels channels;

  // Tensors like x, the mask or the residual included.
  int64_t tensors() const { return source == Source::kSmoothWithResidual ? 3 : 2; }

  Inputs(
      const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight,
      const OptTensor& bias, int64_t function, double slope, const OptTensor& side, at::IntArrayRef sizes = {})
      : chunks(chunks_of(x, sizes, side && side->scalar_type() == at::kByte)), activation(function, slope), grad(grad), x(x),
        side(side), channels(x.size(1), chunks.size(), mean, rstd, weight, bias) {
    expect_like(grad, x, "grad");
    if (activation.shape() == Shape::kPiecewise) {
      source = side ? Source::kMask : Source::kSignOfX;
      TORCH_CHECK(!side || (side->scalar_type() == at::kByte && side->numel() == chunks[0].mask_bytes), "this is not the mask of x");
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
void add_up(const Inputs& inputs, const Layout& layout, const Parameters<A, 3>& parameters, double* sums, T* claimed) {
  const Activated<A> activated(inputs.activation);
  Data<T> data = inputs.data<T>();
  data.y = claimed;
  sum_channels<mask_of(kSource)>(
      layout, parameters, data, sums,
      [=](const auto& view, const Data<T>& from, int64_t at, int64_t i, uint32_t bits, vec_t<A>& p, vec_t<A>& q) {
        const vec_t<A> x = load(from.x + at);
        p = through<kSource>(activated, view, from, at, i, x, bits);
        q = p * (x - view.template get<0>(i));
        if (from.y) __builtin_prefetch(from.y + at, 1);
      });
}

// Writes Σg' and Σg'·x̂ of the channels of a layout at their places in [2, K·C]. Lines of `claimed` are asked for meanwhile: dx,
// whose writing would wait for them.
template <typename T> void reduce(const Inputs& inputs, const Layout& layout, double* out, T* claimed = nullptr) {
  using A = acc_t<T>;
  const Channels& v = inputs.channels;
  const int64_t width = layout.channels, C = v.mean.size();
  std::vector<double> sums(2 * width);
  const Parameters<A, 3> parameters(layout, [&](int64_t c, A* values) { v.affine(c, values); });
  with_source(inputs.source, [&](auto source) { add_up<T, source()>(inputs, layout, parameters, sums.data(), claimed); });
  for (int64_t k = 0; k < width; ++k) {
    const int64_t c = layout.first + k;
    out[c] = sums[k];
    out[C + c] = (sums[width + k] - (v.mean[c] - static_cast<double>(static_cast<A>(v.mean[c]))) * sums[k]) * v.rstd[c];
  }
}

}  // namespace

Tensor batch_backward_reduce(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight,
    const OptTensor& bias, int64_t activation, double slope, const OptTensor& side) {
  const Inputs inputs(grad, x, mean, rstd, weight, bias, activation, slope, side);
  Tensor sums = at::empty({2, x.size(1)}, x.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::batch_backward_reduce", [&] {
    reduce<scalar_t>(inputs, inputs.chunks[0], sums.data_ptr<double>());
  });
  return sums;
}

namespace {

// dx = g'·scale + (x - mean)·slope + shift, the parameters 3, 4 and 5.
template <typename T, Source kSource, bool kAcross, typename A>
void write_rows(
    const Inputs& inputs, const Layout& layout, const Parameters<A, 6>& parameters, const Data<T>& data, bool stream) {
  const Activated<A> activated(inputs.activation);
  const bool stream_second = stream && reinterpret_cast<uintptr_t>(data.second) % 64 == 0;
  for_each_group<kAcross, mask_of(kSource)>(
      layout, parameters, data, [=](const auto& view, const Data<T>& to, int64_t group, int64_t column, uint32_t bits) {
        for (int64_t v = 0; v < kVectors; ++v) {
          const int64_t at = group + v * kLanes, i = column + v * kLanes;
          const vec_t<A> x = load(to.x + at), g = through<kSource>(activated, view, to, at, i, x, bits >> (v * kLanes));
          const vec_t<A> dx = (x - view.template get<0>(i)) * view.template get<4>(i) + view.template get<5>(i);
          claim(to.y + at, stream);
          store(to.y + at, g * view.template get<3>(i) + dx, stream);
          if (kSource != Source::kGrad && to.second) claim(to.second + at, stream_second), store(to.second + at, g, stream_second);
        }
        return 0u;
      });
}

// What the second pass writes, and that pass; means(c) are ⟨g'⟩ and ⟨g'·x̂⟩ of a channel.
struct Outputs {
  Tensor dx, dresidual;

  Outputs(const Inputs& inputs, bool needs_residual) : dx(at::empty_like(inputs.x)) {
    if (!needs_residual) return;
    TORCH_CHECK(inputs.source != Source::kGrad, "without an activation the gradient of the residual is grad itself");
    dresidual = at::empty_like(inputs.x);
  }

  template <typename T, typename Means> void write(const Inputs& inputs, const Layout& layout, Means means) const {
    using A = acc_t<T>;
    const Channels& v = inputs.channels;
    const Parameters<A, 6> parameters(layout, [&](int64_t c, A* values) {
      v.affine(c, values);
      const auto [mean_grad, mean_product] = means(c);
      const double scale = v.scale(c), slope = -scale * v.rstd[c] * mean_product;
      values[3] = static_cast<A>(scale);
      values[4] = static_cast<A>(slope);
      values[5] = static_cast<A>((static_cast<double>(values[0]) - v.mean[c]) * slope - scale * mean_grad);
    });
    Data<T> data = inputs.data<T>();
    data.y = dx.data_ptr<T>();
    if (dresidual.defined()) data.second = dresidual.data_ptr<T>();
    const bool stream = streams(inputs.x, layout, data.y);
    with_constant<bool>(layout.across, [&](auto across) {
      with_source(inputs.source, [&](auto source) { write_rows<T, source(), across()>(inputs, layout, parameters, data, stream); });
    });
  }
};

Outputs input_and_residual(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight,
    const OptTensor& bias, const Tensor& means, int64_t activation, double slope, const OptTensor& side,
    bool needs_residual) {
  const Inputs inputs(grad, x, mean, rstd, weight, bias, activation, slope, side);
  const int64_t C = x.size(1);
  const std::vector<double> mean_of = values_of(means, 2 * C, 0);
  const Outputs outputs(inputs, needs_residual);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::batch_backward_input", [&] {
    outputs.write<scalar_t>(inputs, inputs.chunks[0], [&](int64_t c) { return std::pair(mean_of[c], mean_of[C + c]); });
  });
  return outputs;
}

}  // namespace

Tensor batch_backward_input(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight,
    const OptTensor& bias, const Tensor& means, int64_t activation, double slope, const OptTensor& side) {
  return input_and_residual(grad, x, mean, rstd, weight, bias, means, activation, slope, side, false).dx;
}

std::tuple<Tensor, Tensor> batch_backward_input_and_residual(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight,
    const OptTensor& bias, const Tensor& means, int64_t activation, double slope, const OptTensor& side) {
  const Outputs outputs = input_and_residual(grad, x, mean, rstd, weight, bias, means, activation, slope, side, true);
  return {outputs.dx, outputs.dresidual};
}

std::tuple<Tensor, Tensor> affine_gradients(const double* sums, int64_t chunks, const Tensor& x, const OptTensor& weight) {
  const int64_t C = x.size(1);
  const auto options = x.options().dtype(weight ? weight->scalar_type() : at::kDouble);
  Tensor dbias = at::empty({C}, options), dweight = at::empty({C}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dbias.scalar_type(), "syncnorm::affine_gradients", [&] {
    for (Tensor* out : {&dbias, &dweight}) {
      for (int64_t c = 0; c < C; ++c) {
        double sum = sums[c];
        for (int64_t k = 1; k < chunks; ++k) sum += sums[k * C + c];
        out->data_ptr<scalar_t>()[c] = static_cast<scalar_t>(sum);
      }
      sums += chunks * C;
    }
  });
  return {dbias, dweight};
}

namespace {

// The whole backward of a group of one: dx, g' for the residual (no elements where it is not asked for), and the gradients of
// bias and weight in the dtype of the weight, or float64 without one. Chunks are those of the forward.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight,
    const OptTensor& bias, int64_t activation, double slope, const OptTensor& side, bool needs_residual,
    at::IntArrayRef sizes) {
  const Inputs inputs(grad, x, mean, rstd, weight, bias, activation, slope, side, sizes);
  const int64_t C = inputs.channels.mean.size();  // of all chunks
  TORCH_CHECK(x.numel() > 0, "expected values, got ", x.sizes());
  const Outputs outputs(inputs, needs_residual);
  std::vector<double> sums(2 * C);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::batch_backward", [&] {
    for_each_slab<scalar_t>(inputs.chunks, inputs.tensors(), [&](const Layout& slab) {
      const double count = static_cast<double>(slab.count);
      scalar_t* dx = outputs.dx.data_ptr<scalar_t>();
      const bool claims = !streams(x, slab, dx) && stays<scalar_t>(slab, inputs.tensors());
      reduce<scalar_t>(inputs, slab, sums.data(), claims ? dx : nullptr);
      outputs.write<scalar_t>(inputs, slab, [&](int64_t c) { return std::pair(sums[c] / count, sums[C + c] / count); });
    });
  });
  auto [dbias, dweight] = affine_gradients(sums.data(), inputs.chunks.size(), x, weight);
  return {outputs.dx, needs_residual ? outputs.dresidual : at::empty({0}, x.options()), dbias, dweight};
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
  m.def(
      "batch_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int activation, "
      "float slope, Tensor? side, bool needs_residual, int[] chunks=[]) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(syncnorm, CPU, m) {
  m.impl("batch_backward_reduce", batch_backward_reduce);
  m.impl("batch_backward_input", batch_backward_input);
  m.impl("batch_backward_input_and_residual", batch_backward_input_and_residual);
  m.impl("batch_backward", batch_backward);
}

}  // namespace syncnorm
