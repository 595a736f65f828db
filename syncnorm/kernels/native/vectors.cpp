// Work on the [C] vectors of a layer, one call each: on a small feature map a dozen of torch's operators between two passes
// over the data cost as much as a pass. syncnorm/core says what each of these means.

#include "operators.h"

namespace syncnorm {
Tensor inverse_std(const Tensor& m2, double count, double eps) {
  const int64_t C = m2.numel();
  const double *qp = doubles(m2), divisor = std::max(count, 1.0);
  Tensor rstd = at::empty({C}, m2.options());
  double* out = rstd.data_ptr<double>();
  for (int64_t c = 0; c < C; ++c) out[c] = 1 / std::sqrt(qp[c] / divisor + eps);
  return rstd;
}

namespace {

// Written behind torch's back, so that its check for changed saved tensors must be told.
template <typename F> void write_in_place(const Tensor& t, F write) {
  write();
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

void move_towards(const Tensor& buffer, const double* values, double divisor, double factor) {
  TORCH_CHECK(buffer.dim() == 1, "expected a vector");
  write_in_place(buffer, [&] {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, buffer.scalar_type(), "syncnorm::update_running", [&] {
      using A = acc_t<scalar_t>;
      scalar_t* data = buffer.data_ptr<scalar_t>();
      const int64_t stride = buffer.stride(0);
      const A weight = static_cast<A>(factor);
      for (int64_t c = 0; c < buffer.numel(); ++c) {
        const A old = static_cast<A>(data[c * stride]), value = static_cast<A>(values[c] / divisor);
        // As torch's lerp, which is exact at both ends.
        data[c * stride] = static_cast<scalar_t>(
            std::abs(weight) < A(0.5) ? old + weight * (value - old) : value - (value - old) * (1 - weight));
      }
    });
  });
}

// A batch that is due: its count is more than 1.
void update_running(
    const Tensor& mean, const Tensor& m2, double count, const Tensor& running_mean, const Tensor& running_var,
    const OptTensor& num_batches_tracked, std::optional<double> momentum) {
  const double *mp = doubles(mean), *qp = doubles(m2);
  TORCH_CHECK(
      running_mean.numel() == mean.numel() && running_var.numel() == m2.numel(), "running statistics of ",
      running_mean.numel(), " channels for a batch of ", mean.numel());
  double factor = momentum.value_or(0);
  if (num_batches_tracked) {
    int64_t& counter = *num_batches_tracked->data_ptr<int64_t>();
    write_in_place(*num_batches_tracked, [&] { ++counter; });
    if (!momentum) factor = 1 / static_cast<double>(std::max<int64_t>(counter, 1));
  }
  move_towards(running_mean, mp, 1, factor);
  move_towards(running_var, qp, std::max(count - 1, 1.0), factor);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(syncnorm, m) {
  m.def("inverse_std(Tensor m2, float count, float eps) -> Tensor");
  m.def(
      "update_running(Tensor mean, Tensor m2, float count, Tensor(a!) running_mean, Tensor(b!) running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum) -> ()");
}

TORCH_LIBRARY_IMPL(syncnorm, CPU, m) {
  m.impl("inverse_std", inverse_std);
  m.impl("update_running", update_running);
}

}  // namespace syncnorm
