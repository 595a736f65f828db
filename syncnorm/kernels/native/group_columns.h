// Group norm where channels are innermost: a group is a block of columns, and a sample is taken as a whole.

#pragma once

#include <array>

#include "groups.h"

namespace syncnorm {

// Rows of a channels-innermost sample that are added up in float32 before double takes over.
constexpr int64_t kTerms = 64;

constexpr size_t kPageBytes = 4096;

// Rows of a sample are cut into ranges, for threads where samples are few.
struct Ranges {
  int64_t S, rows, count;
  explicit Ranges(const Groups& s) : S(s.S), rows(std::max(kTerms, 2 * kUnit / s.C)), count((S + rows - 1) / rows) {}
  template <typename F> void each(F f) const {  // within a parallel region it is a loop
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) f(r, r * rows, std::min(S, (r + 1) * rows));
    });
  }
};

// What is needed for one sample after the other, so that memory is asked for once.
template <typename A> struct Workspace {
  Table<A> vectors;      // parameters of elements, per channel
  Table<double> sums;    // three for each range
  std::vector<double> mean, var;
  explicit Workspace(const Groups& s) : vectors(6, s.C), sums(3 * Ranges(s).count, s.C), mean(s.G), var(s.G) {}
};

// For rows [begin, end) of a sample: state = before(column, part) once for a few rows, step(state, element, turn, part) for each
// of them, after(state, column). `turn` counts through the same elements in the order in which to ask for lines ahead: as they lie
// in memory, which the processor's own prefetching takes up. Several rows at once it follows if each has pages to itself.
template <typename T, typename Before, typename Step, typename After>
inline void visit_rows(int64_t C, int64_t origin, int64_t begin, int64_t end, Before before, Step step, After after) {
  const bool pages = C * sizeof(T) >= kPageBytes;
  const int64_t by_column = pages ? 1 : kTogether, by_row = pages ? C : kLanes;
  for (int64_t r = begin; r < end; r += kTogether) {
    const int64_t at = origin + r * C, rows = std::min(kTogether, end - r);
    columns(0, C, [&](int64_t i, auto part) {
      auto state = before(i, part);
      if (rows == kTogether) {
#pragma GCC unroll 4
        for (int64_t k = 0; k < kTogether; ++k) step(state, at + k * C + i, at + i * by_column + k * by_row, part);
      } else {
        for (int64_t k = 0; k < rows; ++k) step(state, at + k * C + i, at + k * C + i, part);
      }
      after(state, i);
    });
  }
}

template <typename A, int K> struct Totals { vec_t<A> parameters[3], sum[K]; };

// Adds up K terms of each element of the sample that begins at `origin`, per channel, into the first K rows of `sums`.
// terms(element, parameters, part, out) sets them; the parameters are those of the first three vectors.
template <int K, typename T, typename Terms>
void sum_columns(const Groups& s, int64_t origin, Workspace<acc_t<T>>& work, Claim<T> claim, Terms terms) {
  using A = acc_t<T>;
  const Ranges ranges(s);
  ranges.each([&](int64_t range, int64_t begin, int64_t end) {
    Table<A> block(K, s.C);
    for (int64_t start = begin; start < end; start += kTerms) {
      visit_rows<T>(
          s.C, origin, start, std::min(end, start + kTerms),
          [&](int64_t i, auto) {
            Totals<A, K> totals;
            for (int k = 0; k < 3; ++k) totals.parameters[k] = load(work.vectors[k] + i);
            for (int k = 0; k < K; ++k) totals.sum[k] = load(block[k] + i);
            return totals;
          },
          [&](auto& totals, int64_t at, int64_t turn, auto part) {
            vec_t<A> out[K];
            claim(turn);
            terms(at, totals.parameters, part, out);
            for (int k = 0; k < K; ++k) totals.sum[k] += out[k];
          },
          [&](auto& totals, int64_t i) {
            for (int k = 0; k < K; ++k) store(block[k] + i, totals.sum[k]);
          });
      for (int k = 0; k < K; ++k) {
        double* sums = work.sums[range * K + k];
        A* more = block[k];
        if (start == begin) {
          std::copy_n(more, s.C, sums);
        } else {
          for (int64_t c = 0; c < s.C; ++c) sums[c] += more[c];
        }
        std::fill_n(more, s.C, A(0));
      }
    }
  });
  for (int64_t row = K; row < ranges.count * K; ++row) {
    const double* more = work.sums[row];
    double* sums = work.sums[row % K];
    for (int64_t c = 0; c < s.C; ++c) sums[c] += more[c];
  }
}

template <Shape kShape, typename T> void forward_sample(const Arguments<T>& f, const Groups& s, int64_t n, Workspace<acc_t<T>>& work) {
  using A = acc_t<T>;
  const int64_t origin = n * s.S * s.C, size = s.D * s.S;
  A *centre = work.vectors[0], *scale = work.vectors[1], *offset = work.vectors[2];
  const double *first = work.sums[0], *second = work.sums[1];
  const T* middle = f.x + origin + s.S / 2 * s.C;
  for (int64_t c = 0; c < s.C; c += s.D) std::fill_n(centre + c, s.D, static_cast<A>(middle[c]));
  for (int pass = 0; pass < 2; ++pass) {
    sum_columns<2>(s, origin, work, Claim<T>{f.out, s.stream}, [&](int64_t at, const vec_t<A>* parameters, auto part, vec_t<A>* out) {
      out[0] = part.keep(part.load(f.x + at) - parameters[0]);
      out[1] = out[0] * out[0];
    });
    bool exact = true;
    for (int64_t g = 0, c = 0; g < s.G; ++g) {
      double total = 0, squares = 0;
      const double pivot = centre[c];
      for (int64_t k = 0; k < s.D; ++k, ++c) total += first[c], squares += second[c];
      const double shift = total / size;
      work.mean[g] = pivot + shift;
      work.var[g] = std::max(0.0, squares / size - shift * shift);
      exact = exact && !(shift * shift > kSafeShift * work.var[g]);
    }
    if (exact) break;
    for (int64_t g = 0; g < s.G; ++g) std::fill_n(centre + g * s.D, s.D, static_cast<A>(work.mean[g]));
  }
  for (int64_t g = 0, c = 0; g < s.G; ++g) {
    const auto statistics = statistics_of<A>(work.mean[g], work.var[g], f.eps);
    f.mean[n * s.G + g] = statistics.mean;
    f.rstd[n * s.G + g] = statistics.rstd;
    for (int64_t k = 0; k < s.D; ++k, ++c) {
      const auto affine = affine_of(statistics, f.weight[c], f.bias[c]);
      centre[c] = affine.mean, scale[c] = affine.scale, offset[c] = affine.offset;
    }
  }
  Ranges(s).each([&](int64_t, int64_t begin, int64_t end) {
    visit_rows<T>(
        s.C, origin, begin, end,
        [&](int64_t i, auto) { return std::tuple(load(centre + i), load(scale + i), load(offset + i)); },
        [&](const auto& v, int64_t at, int64_t turn, auto part) {
          prefetch(f.x + turn + s.S * s.C);
          const auto pre = (part.load(f.x + at) - std::get<0>(v)) * std::get<1>(v) + std::get<2>(v);
          part.store(f.out + at, f.activation.template apply<kShape>(pre), s.stream);
        },
        [](const auto&, int64_t) {});
    if (s.stream) end_streaming();
  });
}

template <Shape kShape, typename T>
void backward_sample(
    const Arguments<T>& f, const Groups& s, int64_t n, const Shares& shares, Workspace<acc_t<T>>& work) {
  using A = acc_t<T>;
  const int64_t origin = n * s.S * s.C, size = s.D * s.S;
  A* vectors[6];
  for (int64_t k = 0; k < 6; ++k) vectors[k] = work.vectors[k];
  for (int64_t g = 0, c = 0; g < s.G; ++g) {
    const Statistics<A> statistics{f.mean[n * s.G + g], 0, f.rstd[n * s.G + g]};
    for (int64_t k = 0; k < s.D; ++k, ++c) {
      const auto affine = affine_of(statistics, f.weight[c], f.bias[c]);
      vectors[0][c] = affine.mean, vectors[1][c] = affine.scale, vectors[2][c] = affine.offset;
    }
  }
  sum_columns<3>(s, origin, work, Claim<T>{f.out, s.stream}, [&](int64_t at, const vec_t<A>* parameters, auto part, vec_t<A>* out) {
    const vec_t<A> d = part.keep(part.load(f.x + at) - parameters[0]);
    out[0] = f.activation.template backward<kShape>(part.load(f.grad + at), d * parameters[1] + parameters[2]);
    out[1] = out[0] * d;
    out[2] = d;
  });
  std::copy_n(work.sums[0], s.C, shares.g);
  std::copy_n(work.sums[1], s.C, shares.gd);
  const double* sum_d = work.sums[2];
  for (int64_t g = 0, c = 0; g < s.G; ++g) {
    double d = 0;
    for (int64_t k = c; k < c + s.D; ++k) d += sum_d[k];
    const auto slopes = slopes_of(s, Shares{shares.g + c, shares.gd + c}, f.weight + c, d, f.rstd[n * s.G + g]);
    for (int64_t k = 0; k < s.D; ++k, ++c) {
      const auto gradient = slopes.gradient(f.weight[c]);
      vectors[3][c] = gradient.scale, vectors[4][c] = gradient.slope, vectors[5][c] = gradient.offset;
    }
  }
  Ranges(s).each([&](int64_t, int64_t begin, int64_t end) {
    visit_rows<T>(
        s.C, origin, begin, end,
        [&](int64_t i, auto) {
          std::array<vec_t<A>, 6> v;
          for (int64_t k = 0; k < 6; ++k) v[k] = load(vectors[k] + i);
          return v;
        },
        [&](const auto& v, int64_t at, int64_t turn, auto part) {
          prefetch(f.x + turn + s.S * s.C);
          prefetch(f.grad + turn + s.S * s.C);
          const vec_t<A> d = part.load(f.x + at) - v[0];
          const vec_t<A> g = f.activation.template backward<kShape>(part.load(f.grad + at), d * v[1] + v[2]);
          part.store(f.out + at, g * v[3] + (d * v[4] + v[5]), s.stream);
        },
        [](const auto&, int64_t) {});
    if (s.stream) end_streaming();
  });
}

}  // namespace syncnorm
