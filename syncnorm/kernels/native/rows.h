// The kernels of rows, which serve groups of a small space too: there a row is a group of one sample, with a weight for each
// element. With them what all norms of this folder share: statistics of a run, parameters, templates by flags.

#pragma once

#include "activation.h"
#include "part.h"

namespace syncnorm {

// Elements summed in float32 before double takes over.
constexpr int64_t kRun = 4096;

// Squared distance of pivot and mean, in variances, up to which deviations from the pivot are good enough.
constexpr double kSafeShift = 16;

// Bytes from which results are written past the caches. With a reader that follows at once it costs a tenth at 8 MiB and saves
// one from 16 MiB on (2 MiB of L2 a core).
constexpr int64_t kStreamed = int64_t(1) << 24;

// Rows whose parameter gradients are added up in registers.
constexpr int64_t kTogether = 4;

// Rows larger than this are taken one by one: several of them, with their gradients, would not stay in cache.
constexpr int64_t kManyBytes = int64_t(1) << 15;

// Reads ahead into the cache: while results are written, what is read next would wait. Beyond the end it does nothing.
inline void prefetch(const void* p) { __builtin_prefetch(p); }

struct Sums { double first = 0, second = 0; };

// Asks for the lines of results while sums are formed, a few at a time: later, writing would wait for them.
template <typename T> struct Claim {
  T* out;
  bool stream;
  void operator()(int64_t i) const { if (!stream) __builtin_prefetch(out + i, 1); }
};

// Σ(x - pivot) and Σ(x - pivot)² of a run; with a pivot of 0 the first is not formed.
template <bool kCentre, typename T> Sums sums_of(const T* x, int64_t n, acc_t<T> pivot, Claim<T> claim) {
  using A = acc_t<T>;
  const vec_t<A> p = splat(pivot);
  Sums sums;
  for (int64_t start = 0; start < n; start += kRun) {
    const int64_t stop = std::min(n, start + kRun);
    vec_t<A> first[4] = {}, second[4] = {};
    int64_t i = start;
    for (; i + 4 * kLanes <= stop; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < 4; ++k) {
        claim(i + k * kLanes);
        const vec_t<A> d = kCentre ? load(x + i + k * kLanes) - p : load(x + i + k * kLanes);
        if (kCentre) first[k] += d;
        second[k] += d * d;
      }
    }
    columns(i, stop, [&](int64_t at, auto part) {
      const vec_t<A> d = kCentre ? part.keep(part.load(x + at) - p) : part.load(x + at);
      if (kCentre) first[0] += d;
      second[0] += d * d;
    });
    if (kCentre) sums.first += fold<A>((first[0] + first[1]) + (first[2] + first[3]));
    sums.second += fold<A>((second[0] + second[1]) + (second[2] + second[3]));
  }
  return sums;
}

// Mean and variance in one pass about a pivot; in a second one about the mean, if the pivot was far from it.
template <typename T> void moments_of(const T* x, int64_t n, double& mean, double& var, Claim<T> claim) {
  using A = acc_t<T>;
  A pivot = static_cast<A>(x[n / 2]);
  const double share = 1.0 / n;
  for (int pass = 0; pass < 2; ++pass) {
    const Sums s = sums_of<true, T>(x, n, pivot, claim);
    const double shift = s.first * share;
    mean = static_cast<double>(pivot) + shift;
    var = std::max(0.0, s.second * share - shift * shift);
    if (!(shift * shift > kSafeShift * var)) break;
    pivot = static_cast<A>(mean);
  }
}

// Vectors of n entries, each padded to whole vectors of lanes.
template <typename A> struct Table {
  int64_t width;
  std::vector<A> values;
  Table(int64_t rows, int64_t n) : width((n + kLanes - 1) / kLanes * kLanes), values(rows * width) {}
  A* operator[](int64_t row) { return values.data() + row * width; }
};

// A parameter in the dtype of the arithmetic; undefined if there is none.
inline Tensor widened(const OptTensor& parameter, int64_t size, at::ScalarType dtype) {
  if (!parameter || !parameter->defined()) return Tensor();
  TORCH_CHECK(parameter->numel() == size, "expected a parameter of ", size, " entries, got ", parameter->numel());
  return parameter->to(dtype).contiguous();
}

template <typename T> const T* data_of(const Tensor& t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; }
template <typename T> const T* data_of(const OptTensor& t) { return t ? t->const_data_ptr<T>() : nullptr; }

inline at::ScalarType accumulate_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Whether rows of `out` are written past the caches: where they would not stay there, and start at whole vectors.
inline bool streams(const Tensor& out) {
  const int64_t bytes = kLanes * out.element_size();
  return out.nbytes() >= kStreamed && out.size(-1) % kLanes == 0 && reinterpret_cast<uintptr_t>(out.const_data_ptr()) % bytes == 0;
}

// Calls f with std::true_type or std::false_type for each flag.
template <typename F> void with_flags(F f) { f(); }
template <typename F, typename... Flags> void with_flags(F f, bool flag, Flags... rest) {
  if (flag) {
    with_flags([&](auto... more) { f(std::true_type(), more...); }, rest...);
  } else {
    with_flags([&](auto... more) { f(std::false_type(), more...); }, rest...);
  }
}

// ---- Rows, forward. ----

// Row r is D elements from r·stride on; its statistics are at r·step.
template <typename T> struct ForwardRows {
  const T *x, *residual;
  T *y, *h;
  const acc_t<T> *weight, *bias;
  acc_t<T> *mean, *rstd;
  int64_t D, part, stride, step;
  double eps;
  bool stream;
  Activated<acc_t<T>> activation;
};

template <typename T> void add_row(const T* x, const T* residual, T* h, int64_t D) {
  columns(0, D, [&](int64_t i, auto part) { part.store(h + i, part.load(x + i) + part.load(residual + i)); });
}

template <bool kCentre, bool kWeight, bool kBias, Shape kShape, typename T>
void normalize_row(const ForwardRows<T>& f, const T* x, T* y, acc_t<T> centre, acc_t<T> rstd, acc_t<T> shift) {
  columns(0, f.D, [&](int64_t i, auto part) {
    prefetch(x + i + f.stride);
    auto v = part.load(x + i);
    if (kCentre) v -= splat(centre);
    v *= splat(rstd);
    if (kCentre) v += splat(shift);
    if (kWeight) v *= part.load(f.weight + i);
    if (kBias) v += part.load(f.bias + i);
    part.store(y + i, f.activation.template apply<kShape>(v), f.stream);
  });
}

template <bool kCentre, bool kWeight, bool kBias, Shape kShape, typename T>
void forward_rows(const ForwardRows<T>& f, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t o = r * f.stride;
    const T* x = f.x + o;
    if (f.residual) {
      add_row(x, f.residual + o, f.h + o, f.D);
      x = f.h + o;
    }
    double mean = 0, var;
    if (kCentre) {
      moments_of(x, f.D, mean, var, {f.y + o, f.stream});
    } else {
      var = sums_of<false, T>(x, f.part, 0, {f.y + o, f.stream}).second / f.part;
    }
    const double rstd = 1 / std::sqrt(var + f.eps);
    const A centre = static_cast<A>(mean);
    // What rounding takes from the mean is given back.
    const A shift = static_cast<A>((static_cast<double>(centre) - mean) * rstd);
    normalize_row<kCentre, kWeight, kBias, kShape, T>(f, x, f.y + o, centre, static_cast<A>(rstd), shift);
    if (kCentre) f.mean[r * f.step] = centre;
    f.rstd[r * f.step] = static_cast<A>(rstd);
  }
  if (f.stream) end_streaming();
}

// ---- Rows, backward. ----

// The bias is read for the activation alone.
template <typename T> struct BackwardRows {
  const T *grad, *h, *grad_h;
  T* dx;
  const acc_t<T> *weight, *bias, *mean, *rstd;
  int64_t D, part, stride, step;
  bool stream;
  Activated<acc_t<T>> activation;
};

// What one row needs for dx = rstd·((u - a) - d·b), x̂ = d·rstd + shift, with d = h - mean.
template <typename A> struct Row { A mean, rstd, a, b, shift; };

template <bool kCentre, bool kWeight, Shape kShape, typename T> Row<acc_t<T>> reduce_row(const BackwardRows<T>& f, int64_t r) {
  using A = acc_t<T>;
  const T *grad = f.grad + r * f.stride, *h = f.h + r * f.stride;
  const A mean = kCentre ? f.mean[r * f.step] : A(0);
  const vec_t<A> scale = splat(f.rstd[r * f.step]);
  const vec_t<A> m = splat(mean);
  const Claim<T> claim{f.dx + r * f.stride, f.stream};
  double u = 0, ud = 0, d = 0;
  for (int64_t start = 0; start < f.D; start += kRun) {
    const int64_t stop = std::min(f.D, start + kRun);
    vec_t<A> us[2] = {}, uds[2] = {}, ds[2] = {};
    auto step = [&](int64_t i, auto part, int64_t k) {
      claim(i);
      const vec_t<A> w = kWeight ? part.load(f.weight + i) : vec_t<A>{};
      vec_t<A> v = part.load(h + i), g = part.load(grad + i);
      if (kCentre) v = part.keep(v - m);
      if (kShape != Shape::kNone) g = f.activation.template backward<kShape>(g, v * scale * w + part.load(f.bias + i));
      if (kWeight) g *= w;
      if (kCentre) us[k] += g, ds[k] += v;
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
  const double rstd = f.rstd[r * f.step], share = 1.0 / f.D;
  const double shift = d * share;  // the mean was rounded: d is about it, and shift what it lacks
  const double b = (ud - shift * u) * rstd * rstd / f.part, a = kCentre ? u * share - shift * b : 0;
  return {mean, static_cast<A>(rstd), static_cast<A>(a), static_cast<A>(b), static_cast<A>(-shift * rstd)};
}

// dx of kRows rows in columns [begin, end), and their share in the gradients of weight and bias.
template <bool kCentre, bool kWeight, bool kParams, Shape kShape, int64_t kRows, typename T>
void backward_columns(
    const BackwardRows<T>& f, int64_t r, int64_t begin, int64_t end, const Row<acc_t<T>>* rows, acc_t<T>* dweight, acc_t<T>* dbias) {
  using A = acc_t<T>;
  columns(begin, end, [&](int64_t i, auto part) {
    vec_t<A> w{}, b{}, dw{}, db{};
    if (kWeight) w = part.load(f.weight + i);
    if (kShape != Shape::kNone) b = part.load(f.bias + i);
#pragma GCC unroll 4
    for (int64_t k = 0; k < kRows; ++k) {
      const int64_t o = (r + k) * f.stride + i;
      const Row<A>& row = rows[k];
      prefetch(f.grad + o + kRows * f.stride);
      prefetch(f.h + o + kRows * f.stride);
      vec_t<A> g = part.load(f.grad + o), d = part.load(f.h + o);
      if (kCentre) d -= splat(row.mean);
      if (kShape != Shape::kNone) g = f.activation.template backward<kShape>(g, d * splat(row.rstd) * w + b);
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

template <bool kCentre, bool kWeight, bool kParams, Shape kShape, int64_t kRows, typename T>
void backward_group(const BackwardRows<T>& f, int64_t r, acc_t<T>* dweight, acc_t<T>* dbias) {
  Row<acc_t<T>> rows[kRows];
  for (int64_t k = 0; k < kRows; ++k) rows[k] = reduce_row<kCentre, kWeight, kShape, T>(f, r + k);
  backward_columns<kCentre, kWeight, kParams, kShape, kRows, T>(f, r, 0, f.part, rows, dweight, dbias);
  if (f.part < f.D) {  // features that are not in the mean square
    for (auto& row : rows) row.b = 0;
    backward_columns<kCentre, kWeight, kParams, kShape, kRows, T>(f, r, f.part, f.D, rows, dweight, dbias);
  }
}

template <bool kCentre, bool kWeight, bool kParams, Shape kShape, typename T>
void backward_rows(const BackwardRows<T>& f, int64_t begin, int64_t end, acc_t<T>* dweight, acc_t<T>* dbias) {
  int64_t r = begin;
  const bool together = f.D * sizeof(T) <= kManyBytes;
  for (; together && r + kTogether <= end; r += kTogether) {
    backward_group<kCentre, kWeight, kParams, kShape, kTogether, T>(f, r, dweight, dbias);
  }
  for (; r < end; ++r) backward_group<kCentre, kWeight, kParams, kShape, 1, T>(f, r, dweight, dbias);
  if (f.stream) end_streaming();
}

}  // namespace syncnorm
