// Norms of rows on CPU: layer norm and RMS norm, with a residual added on the way in. Each row is read once from memory;
// what is done to it afterwards finds it in cache.
//
// Rows are cut into the same units whatever the number of threads, and partial sums are added in the order of the units, so
// gradients of the parameters do not depend on the threads.

#include "rows_apart.h"

namespace syncnorm {
namespace {

// ---- The operators. ----

// Whether features lie apart: [N, S, D] with positions innermost.
bool check_rows(const Tensor& x, const OptTensor& like) {
  const bool apart = x.dim() == 3 && x.transpose(1, 2).is_contiguous();
  TORCH_CHECK(
      apart || (x.dim() == 2 && x.is_contiguous()), "expected contiguous rows [M, D], or [N, S, D] of contiguous [N, D, S], got ",
      x.sizes(), " with strides ", x.strides());
  TORCH_CHECK(
      !like || (like->sizes() == x.sizes() && like->scalar_type() == x.scalar_type() &&
                (apart ? like->transpose(1, 2) : *like).is_contiguous()),
      "expected tensors alike");
  return apart;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_norm_forward(
    const Tensor& x, const OptTensor& weight, const OptTensor& bias, double eps, bool centre, const OptTensor& residual,
    std::optional<int64_t> part) {
  const bool apart = check_rows(x, residual);
  const int64_t D = x.size(-1), M = D ? x.numel() / D : 0;
  TORCH_CHECK(!apart || !part, "expected contiguous rows [M, D] with a part");
  const auto accumulate = x.options().dtype(accumulate_type(x));
  const Tensor w = widened(weight, D, accumulate_type(x)), b = widened(bias, D, accumulate_type(x));
  Tensor y = at::empty_like(x), h = residual ? at::empty_like(x) : at::empty({0}, x.options());
  Tensor mean = at::empty({centre ? M : 0}, accumulate), rstd = at::empty({M}, accumulate);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "syncnorm::row_norm_forward", [&] {
    using A = acc_t<scalar_t>;
    ForwardRows<scalar_t> f{
        x.const_data_ptr<scalar_t>(), data_of<scalar_t>(residual), y.data_ptr<scalar_t>(), h.data_ptr<scalar_t>(),
        data_of<A>(w), data_of<A>(b), mean.data_ptr<A>(), rstd.data_ptr<A>(), D, part.value_or(D), D, 1, eps,
        streams(apart ? y.transpose(1, 2) : y), Activated<A>(Activation(0, 0))};
    if (apart) {
      const auto weights = values_of<A>(weight, D, 1), biases = values_of<A>(bias, D, 0);
      f.weight = weights.data(), f.bias = biases.data();
      const Apart shape(x.size(0), D, x.size(1), x.element_size());
      with_flags([&](auto c) { forward_apart<c>(f, shape); }, centre);
      return;
    }
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
  const bool apart = check_rows(h, grad);
  check_rows(h, grad_h);
  const int64_t D = h.size(-1), M = D ? h.numel() / D : 0;
  TORCH_CHECK(!apart || !part, "expected contiguous rows [M, D] with a part");
  const bool centre = mean && mean->numel(), params = needs_weight || needs_bias;
  const auto accumulate = h.options().dtype(accumulate_type(h));
  const Tensor w = widened(weight, D, accumulate_type(h));
  Tensor dx = at::empty_like(h);
  Tensor dweight = at::empty({needs_weight ? D : 0}, accumulate), dbias = at::empty({needs_bias ? D : 0}, accumulate);
  const int64_t rows = std::clamp<int64_t>(4 * kUnit / D, 16, 256), ranges = (M + rows - 1) / rows;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, h.scalar_type(), "syncnorm::row_norm_backward", [&] {
    using A = acc_t<scalar_t>;
    BackwardRows<scalar_t> f{
        grad.const_data_ptr<scalar_t>(), h.const_data_ptr<scalar_t>(), data_of<scalar_t>(grad_h), dx.data_ptr<scalar_t>(),
        data_of<A>(w), nullptr, centre ? data_of<A>(mean) : nullptr, rstd.const_data_ptr<A>(), D, part.value_or(D), D, 1,
        apart ? streams(dx.transpose(1, 2)) : streams(dx) && part.value_or(D) % kLanes == 0, Activated<A>(Activation(0, 0))};
    if (apart) {
      const auto weights = values_of<A>(weight, D, 1);
      f.weight = weights.data();
      const Apart shape(h.size(0), D, h.size(1), h.element_size());
      std::vector<double> total(2 * D, 0.0);
      with_flags([&](auto c) { backward_apart<c>(f, shape, total); }, centre);
      std::copy_n(total.data(), dweight.numel(), dweight.data_ptr<A>());
      std::copy_n(total.data() + D, dbias.numel(), dbias.data_ptr<A>());
      return;
    }
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
