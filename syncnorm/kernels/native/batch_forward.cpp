// Batch normalisation forward on CPU: moments in one pass over memory, then scale, shift, residual and activation in one.

#include "affine.h"
#include "operators.h"
#include "slabs.h"
#include "sums.h"

namespace syncnorm {
namespace {

constexpr double kSafeShift = 64;  // squared distance of pivot and mean, in variances, up to which one pass is exact

// The mean of the first values of each channel, at most kGroup: any value starts, a few make it a better guess.
template <typename T> std::vector<acc_t<T>> pivots(const Layout& layout, const T* x) {
  using A = acc_t<T>;
  const Part& part = layout.parts[0];
  const int64_t C = layout.channels, S = layout.across ? layout.repeat : part.columns;
  const int64_t n = std::min<int64_t>(S > 1 ? S : layout.samples, kGroup);
  std::vector<A> pivot(C, 0);
  x += part.offset;
  if (S > 1) {
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t i = 0; i < n; ++i) pivot[c] += static_cast<A>(x[c * S + i]);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < C; ++c) pivot[c] += static_cast<A>(x[i * layout.pitch + c]);
    }
  }
  for (A& value : pivot) value /= static_cast<A>(n);
  return pivot;
}

// Writes mean and M2 of the channels of a layout at their places. Lines of y are claimed meanwhile, if there is one.
template <typename T> void moments(const Layout& layout, const Data<T>& data, double* mean, double* m2) {
  using A = acc_t<T>;
  const int64_t C = layout.channels;
  const double count = static_cast<double>(layout.count);
  mean += layout.first, m2 += layout.first;
  std::vector<A> pivot = pivots(layout, data.x);
  auto deviations = [](const auto& view, const auto& from, int64_t at, int64_t i, uint32_t, vec_t<A>& p, vec_t<A>& q) {
    p = load(from.x + at) - view.template get<0>(i);
    q = p * p;
    if (from.y) __builtin_prefetch(from.y + at, 1);  // or writing it would wait for its lines
  };
  for (int pass = 0; pass < 2; ++pass) {
    const Parameters<A, 1> parameters(layout, [&](int64_t c, A* values) { values[0] = pivot[c - layout.first]; });
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
}

}  // namespace

// Mean and M2; the count is x.numel() / C.
std::tuple<Tensor, Tensor> batch_moments(const Tensor& x) {
  const Layout layout(x);
  const int64_t C = layout.channels;
  Tensor mean = at::empty({C}, x.options().dtype(at::kDouble)), m2 = at::empty_like(mean);
  if (x.numel() == 0) return {mean.zero_(), m2.zero_()};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::batch_moments", [&] {
    Data<scalar_t> data;
    data.x = x.const_data_ptr<scalar_t>();
    moments(layout, data, mean.data_ptr<double>(), m2.data_ptr<double>());
  });
  return {mean, m2};
}

namespace {

template <typename T, bool kAcross, Shape kShape, bool kResidual, bool kMask>
void write_rows(
    const Layout& layout, const Parameters<acc_t<T>, 3>& parameters, const Data<T>& data, Activation activation, bool stream) {
  const Activated<acc_t<T>> activated(activation);
  for_each_group<kAcross, kMask ? Mask::kWrite : Mask::kNone>(
      layout, parameters, data, [=](const auto& view, const Data<T>& to, int64_t at, int64_t i, uint32_t) {
        uint32_t bits = 0;
        for (int64_t v = 0; v < kVectors; ++v) {
          const int64_t j = at + v * kLanes;
          vec_t<acc_t<T>> pre = pre_activation(load(to.x + j), view, i + v * kLanes);
          if constexpr (kResidual) pre += load(to.residual + j);
          if constexpr (kMask) bits |= positive_bits(pre) << (v * kLanes);
          claim(to.y + j, stream);
          store(to.y + j, activated.template apply<kShape>(pre), stream);
        }
        return bits;
      });
}

template <typename T>
void normalize(const Layout& layout, const Channels& channels, const Data<T>& data, Activation activation, bool stream) {
  const Parameters<acc_t<T>, 3> parameters(layout, [&](int64_t c, auto* values) { channels.affine(c, values); });
  with_constant<bool>(layout.across, [&](auto across) {
    with_shape(activation.shape(), [&](auto shape) {
      constexpr bool kPiecewise = shape() == Shape::kPiecewise;
      if (!data.residual) return write_rows<T, across(), shape(), false, false>(layout, parameters, data, activation, stream);
      write_rows<T, across(), shape(), true, kPiecewise>(layout, parameters, data, activation, stream);
    });
  });
}

// What normalising reads and writes.
struct Forward {
  std::vector<Layout> chunks;
  Activation activation;
  const Tensor& x;
  const OptTensor& residual;
  Tensor y, mask;

  Forward(const Tensor& x, int64_t function, double slope, const OptTensor& residual, at::IntArrayRef sizes = {})
      : activation(function, slope), x(x), residual(residual), y(at::empty_like(x)) {
    const bool masked = residual && activation.shape() == Shape::kPiecewise;
    chunks = chunks_of(x, sizes, masked);
    if (residual) expect_like(*residual, x, "residual");
    if (masked) mask = at::empty({chunks[0].mask_bytes}, x.options().dtype(at::kByte));
  }

  template <typename T> Data<T> data() const {
    Data<T> data;
    data.x = x.const_data_ptr<T>();
    data.y = y.data_ptr<T>();
    if (residual) data.residual = residual->const_data_ptr<T>();
    if (mask.defined()) data.new_mask = mask.data_ptr<uint8_t>();
    return data;
  }
};

Forward normalized(
    const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight, const OptTensor& bias,
    int64_t activation, double slope, const OptTensor& residual) {
  Forward f(x, activation, slope, residual);
  const Channels channels(x.size(1), 1, mean, rstd, weight, bias);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::batch_normalize", [&] {
    const Data<scalar_t> data = f.data<scalar_t>();
    normalize(f.chunks[0], channels, data, f.activation, streams(x, f.chunks[0], data.y));
  });
  return f;
}

}  // namespace

Tensor batch_normalize(
    const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight, const OptTensor& bias,
    int64_t activation, double slope, const OptTensor& residual) {
  return normalized(x, mean, rstd, weight, bias, activation, slope, residual).y;
}

std::tuple<Tensor, Tensor> batch_normalize_masked(
    const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight, const OptTensor& bias,
    int64_t activation, double slope, const Tensor& residual) {
  const Forward f = normalized(x, mean, rstd, weight, bias, activation, slope, residual);
  TORCH_CHECK(f.mask.defined(), "a mask is that of a piecewise linear activation");
  return {f.y, f.mask};
}

namespace {

// The whole forward of a group of one: y, mean, M2, 1/std and the mask, which has no bytes where none is needed. Statistics are
// [C], or [K, C] of chunks of these numbers of samples.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_forward(
    const Tensor& x, const OptTensor& weight, const OptTensor& bias, double eps, int64_t activation, double slope,
    const OptTensor& residual, at::IntArrayRef sizes) {
  Forward f(x, activation, slope, residual, sizes);
  const int64_t C = x.size(1), K = f.chunks.size();
  TORCH_CHECK(x.numel() > 0, "expected values, got ", x.sizes());
  const auto options = x.options().dtype(at::kDouble);
  Tensor mean = sizes.empty() ? at::empty({C}, options) : at::empty({K, C}, options);
  Tensor m2 = at::empty_like(mean), rstd = at::empty_like(mean);
  double *mp = mean.data_ptr<double>(), *qp = m2.data_ptr<double>(), *rp = rstd.data_ptr<double>();
  Channels channels(C, K, std::nullopt, std::nullopt, weight, bias);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::batch_forward", [&] {
    const Data<scalar_t> data = f.data<scalar_t>();
    Data<scalar_t> x_alone;
    x_alone.x = data.x;
    for_each_slab<scalar_t>(f.chunks, 1, [&](const Layout& slab) {
      const bool stream = streams(x, slab, data.y);
      moments(slab, !stream && stays<scalar_t>(slab, 1) ? data : x_alone, mp, qp);
      for (int64_t c = slab.first; c < slab.first + slab.channels; ++c) {
        channels.mean[c] = mp[c];
        channels.rstd[c] = rp[c] = 1 / std::sqrt(qp[c] / static_cast<double>(slab.count) + eps);
      }
      normalize(slab, channels, data, f.activation, stream);
    });
  });
  return {f.y, mean, m2, rstd, f.mask.defined() ? f.mask : at::empty({0}, x.options().dtype(at::kByte))};
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
  m.def(
      "batch_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, int activation, float slope, Tensor? residual, "
      "int[] chunks=[]) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(syncnorm, CPU, m) {
  m.impl("batch_moments", batch_moments);
  m.impl("batch_normalize", batch_normalize);
  m.impl("batch_normalize_masked", batch_normalize_masked);
  m.impl("batch_forward", batch_forward);
}

}  // namespace syncnorm
