// Batch normalisation forward on CPU: moments in one pass over memory, then scale, shift, residual and activation in one.

#include "affine.h"
#include "sums.h"

namespace syncnorm {
namespace {

constexpr double kSafeShift = 64;  // squared distance of pivot and mean, in variances, up to which one pass is exact

// The mean of the first values of each channel, at most kGroup: any value starts, a few make it a better guess.
template <typename T> std::vector<acc_t<T>> pivots(const Tensor& x) {
  using A = acc_t<T>;
  const int64_t C = x.size(1), S = x.dim() == 3 ? x.size(2) : 1;
  const bool inner = x.dim() == 3;
  const int64_t n = std::min<int64_t>(inner ? S : x.size(0), kGroup);
  const T* data = x.const_data_ptr<T>();
  std::vector<A> pivot(C, 0);
  if (inner) {
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t i = 0; i < n; ++i) pivot[c] += static_cast<A>(data[c * S + i]);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < C; ++c) pivot[c] += static_cast<A>(data[i * C + c]);
    }
  }
  for (A& value : pivot) value /= static_cast<A>(n);
  return pivot;
}

// Mean and M2; the count is x.numel() / C.
std::tuple<Tensor, Tensor> batch_moments(const Tensor& x) {
  const Layout layout(x);
  const int64_t C = layout.channels;
  const double count = C ? static_cast<double>(x.numel() / C) : 0;
  Tensor mean_out = at::empty({C}, x.options().dtype(at::kDouble)), m2_out = at::empty_like(mean_out);
  if (count == 0) return {mean_out.zero_(), m2_out.zero_()};
  double *mean = mean_out.data_ptr<double>(), *m2 = m2_out.data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::batch_moments", [&] {
    using A = acc_t<scalar_t>;
    std::vector<A> pivot = pivots<scalar_t>(x);
    Data<scalar_t> data;
    data.x = x.const_data_ptr<scalar_t>();
    auto deviations = [](const auto& view, const auto& from, int64_t at, int64_t i, uint32_t, vec_t<A>& p, vec_t<A>& q) {
      p = load(from.x + at) - view.template get<0>(i);
      q = p * p;
    };
    for (int pass = 0; pass < 2; ++pass) {
      const Parameters<A, 1> parameters(layout, [&](int64_t c, A* values) { values[0] = pivot[c]; });
      std::vector<double> sums(2 * C);
      sum_channels<Mask::kNone>(layout, parameters, data, sums.data(), deviations);
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
  return {mean_out, m2_out};
}

template <typename T, bool kAcross, Shape kShape, bool kResidual, bool kMask>
void normalize(const Layout& layout, const Parameters<acc_t<T>, 3>& parameters, const Data<T>& data, Activation activation) {
  const Activated<acc_t<T>> activated(activation);
  const bool stream = streams<T>(layout, data.y);
  for_each_group<kAcross, kMask ? Mask::kWrite : Mask::kNone>(
      layout, parameters, data, [=](const auto& view, const Data<T>& to, int64_t at, int64_t i, uint32_t) {
        uint32_t bits = 0;
        for (int64_t v = 0; v < kVectors; ++v) {
          const int64_t j = at + v * kLanes;
          vec_t<acc_t<T>> pre = pre_activation(load(to.x + j), view, i + v * kLanes);
          if constexpr (kResidual) pre += load(to.residual + j);
          if constexpr (kMask) bits |= positive_bits(pre) << (v * kLanes);
          store(to.y + j, activated.template apply<kShape>(pre), stream);
        }
        return bits;
      });
}

std::tuple<Tensor, Tensor> normalize_and_mask(
    const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight, const OptTensor& bias,
    int64_t function, double slope, const OptTensor& residual, bool masked) {
  const Layout layout(x, masked);
  const Activation activation(function, slope);
  Tensor y = at::empty_like(x), mask;
  if (residual) expect_like(*residual, x, "residual");
  if (masked) mask = at::empty({layout.mask_bytes}, x.options().dtype(at::kByte));
  const Channels channels(layout.channels, mean, rstd, weight, bias);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::batch_normalize", [&] {
    using T = scalar_t;
    const Parameters<acc_t<T>, 3> parameters(layout, [&](int64_t c, auto* values) { channels.affine(c, values); });
    Data<T> data;
    data.x = x.const_data_ptr<T>();
    data.y = y.data_ptr<T>();
    if (residual) data.residual = residual->const_data_ptr<T>();
    if (masked) data.new_mask = mask.data_ptr<uint8_t>();
    with_constant<bool>(layout.across, [&](auto across) {
      with_shape(activation.shape(), [&](auto shape) {
        constexpr bool kPiecewise = shape() == Shape::kPiecewise;
        if (!residual) return normalize<T, across(), shape(), false, false>(layout, parameters, data, activation);
        normalize<T, across(), shape(), true, kPiecewise>(layout, parameters, data, activation);
      });
    });
  });
  return {y, mask};
}

Tensor batch_normalize(
    const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight, const OptTensor& bias,
    int64_t activation, double slope, const OptTensor& residual) {
  return std::get<0>(normalize_and_mask(x, mean, rstd, weight, bias, activation, slope, residual, false));
}

std::tuple<Tensor, Tensor> batch_normalize_masked(
    const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight, const OptTensor& bias,
    int64_t activation, double slope, const Tensor& residual) {
  return normalize_and_mask(x, mean, rstd, weight, bias, activation, slope, residual, true);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(syncnorm, m) {
  m.def("batch_moments(Tensor x) -> (Tensor, Tensor)");
  m.def(
      "batch_normalize(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int activation, float slope, "
      "Tensor? residual) -> Tensor");
  m.def(
      "batch_normalize_masked(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int activation, "
      "float slope, Tensor residual) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(syncnorm, CPU, m) {
  m.impl("batch_moments", batch_moments);
  m.impl("batch_normalize", batch_normalize);
  m.impl("batch_normalize_masked", batch_normalize_masked);
}

}  // namespace syncnorm
