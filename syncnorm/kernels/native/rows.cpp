// Norms of rows on CPU: layer norm and RMS norm, with a residual added on the way in. Each row is read once from memory;
// what is done to it afterwards finds it in cache.
//
// Rows are cut into the same units whatever the number of threads, and partial sums are added in the order of the units, so
// gradients of the parameters do not depend on the threads.

#include "rows.h"

namespace syncnorm {
namespace {

// Rows whose parameter gradients are added up in registers.
constexpr int64_t kGroup = 4;

// ---- Forward. ----

template <typename T> struct Forward {
  const T *x, *residual;
  T *y, *h;
  const acc_t<T> *weight, *bias;
  acc_t<T> *mean, *rstd;
  int64_t D, part;
  double eps;
  bool stream;
};

template <typename T> void add_row(const T* x, const T* residual, T* h, int64_t D) {
  columns(0, D, [&](int64_t i, auto part) { part.store(h + i, part.load(x + i) + part.load(residual + i)); });
}

template <bool kCentre, bool kWeight, bool kBias, typename T>
void normalize_row(
    const T* x, T* y, int64_t D, acc_t<T> centre, acc_t<T> rstd, acc_t<T> shift, const acc_t<T>* weight, const acc_t<T>* bias,
    bool stream) {
  columns(0, D, [&](int64_t i, auto part) {
    auto v = part.load(x + i);
    if (kCentre) v -= splat(centre);
    v *= splat(rstd);
    if (kCentre) v += splat(shift);
    if (kWeight) v *= part.load(weight + i);
    if (kBias) v += part.load(bias + i);
    part.store(y + i, v, stream);
  });
}

template <bool kCentre, bool kWeight, bool kBias, typename T> void forward_rows(const Forward<T>& f, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t o = r * f.D;
    const T* x = f.x + o;
    if (f.residual) {
      add_row(x, f.residual + o, f.h + o, f.D);
      x = f.h + o;
    }
    double mean = 0, var;
    if (kCentre) {
      moments_of(x, f.D, mean, var);
    } else {
      var = sums_of<false, T>(x, f.part, 0).second / f.part;
    }
    const double rstd = 1 / std::sqrt(var + f.eps);
    const A centre = static_cast<A>(mean);
    // What rounding takes from the mean is given back.
    const A shift = static_cast<A>((static_cast<double>(centre) - mean) * rstd);
    normalize_row<kCentre, kWeight, kBias, T>(x, f.y + o, f.D, centre, static_cast<A>(rstd), shift, f.weight, f.bias, f.stream);
    if (kCentre) f.mean[r] = centre;
    f.rstd[r] = static_cast<A>(rstd);
  }
  if (f.stream) end_streaming();
}

// ---- Backward. ----

template <typename T> struct Backward {
  const T *grad, *h, *grad_h;
  T* dx;
  const acc_t<T> *weight, *mean, *rstd;
  int64_t D, part;
  bool stream;
};

// What one row needs for dx = rstd·((u - a) - d·b), x̂ = d·rstd + shift, with d = h - mean.
template <typename A> struct Row { A mean, rstd, a, b, shift; };

template <bool kCentre, bool kWeight, typename T> Row<acc_t<T>> reduce_row(const Backward<T>& f, int64_t r) {
  using A = acc_t<T>;
  const T *grad = f.grad + r * f.D, *h = f.h + r * f.D;
  const A mean = kCentre ? f.mean[r] : A(0);
  const vec_t<A> m = splat(mean);
  double u = 0, ud = 0, d = 0;
  for (int64_t start = 0; start < f.D; start += kRun) {
    const int64_t stop = std::min(f.D, start + kRun);
    vec_t<A> us[2] = {}, uds[2] = {}, ds[2] = {};
    auto step = [&](int64_t i, auto part, int64_t k) {
      vec_t<A> g = part.load(grad + i);
      if (kWeight) g *= part.load(f.weight + i);
      vec_t<A> v = part.load(h + i);
      if (kCentre) {
        v = part.keep(v - m);
        us[k] += g;
        ds[k] += v;
      }
      uds[k] += g * v;
    };
    int64_t i = start;
    for (; i + 2 * kLanes <= stop; i += 2 * kLanes) {
      step(i, Whole(), 0);
      step(i + kLanes, Whole(), 1);
    }
    columns(i, stop, [&](int64_t at, auto part) { step(at, part, 0); });
    ud += fold<A>(uds[0] + uds[1]);
    if (kCentre) u += fold<A>(us[0] + us[1]), d += fold<A>(ds[0] + ds[1]);
  }
  const double rstd = f.rstd[r], share = 1.0 / f.D;
  const double shift = d * share;  // the mean was rounded: d is about it, and shift what it lacks
  const double b = (ud - shift * u) * rstd * rstd / f.part, a = kCentre ? u * share - shift * b : 0;
  return {mean, static_cast<A>(rstd), static_cast<A>(a), static_cast<A>(b), static_cast<A>(-shift * rstd)};
}

// dx of kRows rows in columns [begin, end), and their share in the gradients of weight and bias.
template <bool kCentre, bool kWeight, bool kParams, int64_t kRows, typename T>
void backward_columns(
    const Backward<T>& f, int64_t r, int64_t begin, int64_t end, const Row<acc_t<T>>* rows, acc_t<T>* dweight, acc_t<T>* dbias) {
  using A = acc_t<T>;
  columns(begin, end, [&](int64_t i, auto part) {
    vec_t<A> w{}, dw{}, db{};
    if (kWeight) w = part.load(f.weight + i);
#pragma GCC unroll 4
    for (int64_t k = 0; k < kRows; ++k) {
      const int64_t o = (r + k) * f.D + i;
      const Row<A>& row = rows[k];
      const vec_t<A> g = part.load(f.grad + o);
      vec_t<A> d = part.load(f.h + o);
      if (kCentre) d -= splat(row.mean);
      vec_t<A> v = kWeight ? g * w : g;
      if (kCentre) v -= splat(row.a);
      v = (v - d * splat(row.b)) * splat(row.rstd);
      if (f.grad_h) v += part.load(f.grad_h + o);
      part.store(f.dx + o, v, f.stream);
      if (kParams) {
        dw += g * (kCentre ? d * splat(row.rstd) + splat(row.shift) : d * splat(row.rstd));
        db += g;
      }
    }
    if (kParams) {
      store(dweight + i, load(dweight + i) + dw);
      if (kCentre) store(dbias + i, load(dbias + i) + db);
    }
  });
}

template <bool kCentre, bool kWeight, bool kParams, int64_t kRows, typename T>
void backward_group(const Backward<T>& f, int64_t r, acc_t<T>* dweight, acc_t<T>* dbias) {
  Row<acc_t<T>> rows[kRows];
  for (int64_t k = 0; k < kRows; ++k) rows[k] = reduce_row<kCentre, kWeight, T>(f, r + k);
  backward_columns<kCentre, kWeight, kParams, kRows, T>(f, r, 0, f.part, rows, dweight, dbias);
  if (f.part < f.D) {  // features that are not in the mean square
    for (auto& row : rows) row.b = 0;
    backward_columns<kCentre, kWeight, kParams, kRows, T>(f, r, f.part, f.D, rows, dweight, dbias);
  }
}

template <bool kCentre, bool kWeight, bool kParams, typename T>
void backward_rows(const Backward<T>& f, int64_t begin, int64_t end, acc_t<T>* dweight, acc_t<T>* dbias) {
  int64_t r = begin;
  for (; r + kGroup <= end; r += kGroup) backward_group<kCentre, kWeight, kParams, kGroup, T>(f, r, dweight, dbias);
  for (; r < end; ++r) backward_group<kCentre, kWeight, kParams, 1, T>(f, r, dweight, dbias);
  if (f.stream) end_streaming();
}

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
    const Forward<scalar_t> f{
        x.const_data_ptr<scalar_t>(), data_of<scalar_t>(residual), y.data_ptr<scalar_t>(), h.data_ptr<scalar_t>(),
        data_of<A>(w), data_of<A>(b), mean.data_ptr<A>(), rstd.data_ptr<A>(), D, part.value_or(D), eps, streams(y)};
    at::parallel_for(0, M, std::max<int64_t>(1, kUnit / D), [&](int64_t begin, int64_t end) {
      with_flags(
          [&](auto c, auto hw, auto hb) { forward_rows<c, hw, hb, scalar_t>(f, begin, end); }, centre, w.defined(), b.defined());
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
    const Backward<scalar_t> f{
        grad.const_data_ptr<scalar_t>(), h.const_data_ptr<scalar_t>(), data_of<scalar_t>(grad_h), dx.data_ptr<scalar_t>(),
        data_of<A>(w), centre ? data_of<A>(mean) : nullptr, rstd.const_data_ptr<A>(), D, part.value_or(D),
        streams(dx) && part.value_or(D) % kLanes == 0};
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
              backward_rows<c, hw, p, scalar_t>(f, range * rows, std::min(M, (range + 1) * rows), mine, mine + width);
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
