// Norms of rows on CPU: layer norm and RMS norm, with a residual added on the way in. Each row is read once from memory;
// what is done to it afterwards finds it in cache.
//
// Rows are cut into the same units whatever the number of threads, and partial sums are added in the order of the units, so
// gradients of the parameters do not depend on the threads.

#include "rows.h"

namespace syncnorm {
namespace {

// ---- The operators. ----

void check_rows(const Tensor& x, const OptTensor& like) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "expected contiguous rows [M, D], got ", x.sizes());
  TORCH_CHECK(
      !like || (like->sizes() == x.sizes() && like->scalar_type() == x.scalar_type() && like->is_contiguous()),
      "expected tensors alike");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_norm_forward(
    const Tensor& x, const OptTensor& weight, const OptTensor& bias, double eps, bool centre, const OptTensor& residual,
    std::optional<int64_t> part) {
  check_rows(x, residual);
  const int64_t M = x.size(0), D = x.size(1);
  const auto accumulate = x.options().dtype(accumulate_type(x));
  const Tensor w = widened(weight, D, accumulate_type(x)), b = widened(bias, D, accumulate_type(x));
  Tensor y = at::empty_like(x), h = residual ? at::empty_like(x) : at::empty({0}, x.options());
  Tensor mean = at::empty({centre ? M : 0}, accumulate), rstd = at::empty({M}, accumulate);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::row_norm_forward", [&] {
    using A = acc_t<scalar_t>;
    const ForwardRows<scalar_t> f{
        x.const_data_ptr<scalar_t>(), data_of<scalar_t>(residual), y.data_ptr<scalar_t>(), h.data_ptr<scalar_t>(),
        data_of<A>(w), data_of<A>(b), mean.data_ptr<A>(), rstd.data_ptr<A>(), D, part.value_or(D), D, 1, eps, streams(y),
        Activated<A>(Activation(0, 0))};
    at::parallel_for(0, M, std::max<int64_t>(1, kUnit / D), [&](int64_t begin, int64_t end) {
      with_flags(
          [&](auto c, auto hw, auto hb) { forward_rows<c, hw, hb, Shape::kNone, scalar_t>(f, begin, end); }, centre, w.defined(), b.defined());
    });
  });
  return {y, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> row_norm_backward(
    const Tensor& grad, const Tensor& h, const OptTensor& weight, const OptTensor& mean, const Tensor& rstd, bool needs_weight,
    bool needs_bias, const OptTensor& grad_h, std::optional<int64_t> part) {
  check_rows(h, grad);
  check_rows(h, grad_h);
  const int64_t M = h.size(0), D = h.size(1);
  const bool centre = mean && mean->numel(), params = needs_weight || needs_bias;
  const auto accumulate = h.options().dtype(accumulate_type(h));
  const Tensor w = widened(weight, D, accumulate_type(h));
  Tensor dx = at::empty_like(h);
  Tensor dweight = at::empty({needs_weight ? D : 0}, accumulate), dbias = at::empty({needs_bias ? D : 0}, accumulate);
  const int64_t rows = std::clamp<int64_t>(4 * kUnit / D, 16, 256), ranges = (M + rows - 1) / rows;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, h.scalar_type(), "syncnorm::row_norm_backward", [&] {
    using A = acc_t<scalar_t>;
    const BackwardRows<scalar_t> f{
        grad.const_data_ptr<scalar_t>(), h.const_data_ptr<scalar_t>(), data_of<scalar_t>(grad_h), dx.data_ptr<scalar_t>(),
        data_of<A>(w), nullptr, centre ? data_of<A>(mean) : nullptr, rstd.const_data_ptr<A>(), D, part.value_or(D), D, 1,
        streams(dx) && part.value_or(D) % kLanes == 0, Activated<A>(Activation(0, 0))};
    // Whole vectors of sums: storing a part of one and loading it again soon would wait.
    const int64_t width = (D + kLanes - 1) / kLanes * kLanes;
    Tensor partial = at::empty({params ? ranges : 0, 2, width}, accumulate);
    A* sums = partial.data_ptr<A>();
    at::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
      for (int64_t range = begin; range < end; ++range) {
        A* mine = params ? sums + range * 2 * width : nullptr;
        if (params) std::fill(mine, mine + 2 * width, A(0));
        with_flags(
            [&](auto c, auto hw, auto p) {
              backward_rows<c, hw, p, Shape::kNone, scalar_t>(f, range * rows, std::min(M, (range + 1) * rows), mine, mine + width);
            },
            centre, w.defined(), params);
      }
    });
    for (int64_t which = 0; which < 2; ++which) {
      Tensor& out = which ? dbias : dweight;
      if (!out.numel()) continue;
      std::vector<double> total(D, 0.0);
      for (int64_t range = 0; range < ranges; ++range) {
        for (int64_t i = 0; i < D; ++i) total[i] += sums[(range * 2 + which) * width + i];
      }
      std::copy(total.begin(), total.end(), out.data_ptr<A>());
    }
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace syncnorm

TORCH_LIBRARY_FRAGMENT(syncnorm, m) {
  m.def(
      "row_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, bool centre, Tensor? residual, int? part)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "row_norm_backward(Tensor grad, Tensor h, Tensor? weight, Tensor? mean, Tensor rstd, bool needs_weight, bool needs_bias,"
      " Tensor? grad_h, int? part) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(syncnorm, CPU, m) {
  m.impl("row_norm_forward", syncnorm::row_norm_forward);
  m.impl("row_norm_backward", syncnorm::row_norm_backward);
}
