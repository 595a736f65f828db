// Two sums per channel over all elements, in one pass over memory.
//
// Work is cut into the same units whatever the number of threads, and partial sums are added in the order of the units, so
// results do not depend on the threads. Sums run in float32 over 16 terms and are then carried on in double. That is not
// caution: data far from zero is quantised, the squares of its deviations share their low bits, and a float32 sum of a few
// hundred of them rounds down more often than up (5e-7 of the variance at mean/std = 1e4, more than torch's own layer
// loses).

#pragma once

#include "batch.h"

namespace syncnorm {

constexpr int64_t kTerms = 16;          // added up in float32
constexpr int64_t kRun = 2 * kTerms;    // groups of a run, in two chains
constexpr int64_t kMaxUnits = 64;

// Doubles for all lanes, in halves that fill a register each.
struct WideSum {
  typedef double Half __attribute__((vector_size(kLanes * sizeof(double) / 2)));
  Half halves[2] = {};

  template <typename A> void add(vec_t<A> v) {
    typedef A Narrow __attribute__((vector_size(kLanes * sizeof(A) / 2)));
    Narrow parts[2];
    std::memcpy(parts, &v, sizeof(v));
    for (int h = 0; h < 2; ++h) halves[h] += __builtin_convertvector(parts[h], Half);
  }
  double total() const {
    const Half both = halves[0] + halves[1];
    double sum = 0;
    for (int64_t l = 0; l < kLanes / 2; ++l) sum += both[l];
    return sum;
  }
};

template <typename A> struct TwoSums {
  vec_t<A> p[kVectors] = {}, q[kVectors] = {};

  template <typename Terms, typename V, typename T>
  inline __attribute__((always_inline)) void add(
      Terms terms, const V& view, const Data<T>& data, int64_t at, int64_t i, uint32_t bits, int64_t skip) {
    for (int64_t v = 0; v < kVectors; ++v) {
      vec_t<A> first, second;
      terms(view, data, at + v * kLanes, i + v * kLanes, bits >> (v * kLanes), first, second);
      if (skip) {
        const mask_t<A> fresh = lane_numbers<A>() >= static_cast<lane_t<A>>(skip - v * kLanes);
        first = fresh ? first : vec_t<A>{}, second = fresh ? second : vec_t<A>{};
      }
      p[v] += first, q[v] += second;
    }
  }
};

// Adds partial sums [units, 2, width] to the channels of `sums` [2, C], in the order of the units.
inline void fold(std::vector<double>& partial, const Layout& layout, double* sums) {
  const size_t stride = 2 * layout.width;
  for (size_t unit = stride; unit < partial.size(); unit += stride) {
    for (size_t i = 0; i < stride; ++i) partial[i] += partial[unit + i];
  }
  layout.for_each_entry([&](int64_t entry, int64_t c) {
    sums[c] += partial[entry];
    sums[layout.channels + c] += partial[layout.width + entry];
  });
}

// Blocks of channels, so that a lane is folded once for all samples of a unit, times ranges of samples.
template <Mask kMask, typename T, typename A, int K, typename Terms>
void sum_runs(const Layout& layout, const Parameters<A, K>& parameters, const Data<T>& data, double* sums, Terms terms) {
  const Part& part = layout.parts[0];
  const int64_t C = layout.channels, S = part.columns, N = part.rows / C;
  const int64_t width = std::clamp<int64_t>(kUnit / S, 1, std::min<int64_t>(C, 64)), blocks = (C + width - 1) / width;
  const int64_t depth = std::max<int64_t>(1, kUnit / (width * S));  // samples per unit, at least
  const int64_t ranges = std::clamp<int64_t>(kMaxUnits / blocks, 1, std::max<int64_t>(1, N / depth));
  const int64_t together = std::max<int64_t>(1, kRun / ((S + kGroup - 1) / kGroup));  // samples that share a sum
  std::vector<double> partial(ranges * 2 * C);
  at::parallel_for(0, blocks * ranges, 1, [&](int64_t begin, int64_t end) {
    std::vector<WideSum> lanes(width * 2);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t c0 = unit % blocks * width, c1 = std::min(C, c0 + width), range = unit / blocks;
      const int64_t n1 = (range + 1) * N / ranges;
      std::fill(lanes.begin(), lanes.end(), WideSum{});
      for (int64_t n = range * N / ranges; n < n1; n += together) {
        for (int64_t c = c0; c < c1; ++c) {
          const View<A, K, false> view(parameters, c);
          WideSum* lane = lanes.data() + (c - c0) * 2;
          TwoSums<A> even, odd;  // two chains hide the latency of an addition
          auto carry = [&]() __attribute__((always_inline)) {
            for (int64_t v = 0; v < kVectors; ++v) {
              lane[0].add<A>(even.p[v] + odd.p[v]);
              lane[1].add<A>(even.q[v] + odd.q[v]);
            }
          };
          for (int64_t m = n; m < std::min(n + together, n1); ++m) {
            const Span row = layout.run(part, m, c);
            auto add = [&](TwoSums<A>& to, int64_t i, int64_t skip) __attribute__((always_inline)) {
              to.add(terms, view, data, row.at + i, i, bits_at<kMask>(data.mask, row, i), skip);
            };
            int64_t i = 0;
            while (true) {
              const int64_t stop = std::min(S, i + kRun * kGroup) - 2 * kGroup;
              for (; i <= stop; i += 2 * kGroup) add(even, i, 0), add(odd, i + kGroup, 0);
              if (i + 2 * kGroup > S) break;
              carry();
              even = odd = {};
            }
            for (; i < S; i += kGroup) {
              const int64_t start = std::min(i, S - kGroup);
              add(odd, start, i - start);
            }
          }
          carry();
        }
      }
      for (int64_t c = c0; c < c1; ++c) {
        partial[range * 2 * C + c] = lanes[(c - c0) * 2].total();
        partial[range * 2 * C + C + c] = lanes[(c - c0) * 2 + 1].total();
      }
    }
  });
  fold(partial, layout, sums);
}

// Adds a few rows to the sums of their columns: a visit of the sums costs more than the arithmetic.
template <Mask kMask, typename T, typename A, typename V, typename Terms>
void add_rows(
    const Data<T>& data, const Span& row, int64_t rows, const Part& part, const V& view, Terms terms, A* first, A* second) {
  cover<kMask>(data, row, [&](const Data<T>& from, int64_t at, int64_t i, uint32_t bits, int64_t skip) {
    TwoSums<A> sums;
    for (int64_t v = 0; v < kVectors; ++v) {
      sums.p[v] = load(first + i + v * kLanes), sums.q[v] = load(second + i + v * kLanes);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Span next{row.at + r * part.pitch, row.bits + r * part.bit_pitch, row.n};
      if (kMask == Mask::kRead && r > 0) bits = bits_at<kMask>(data.mask, next, i);
      sums.add(terms, view, from, at + r * part.pitch, i, bits, skip);
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      store(first + i + v * kLanes, sums.p[v]), store(second + i + v * kLanes, sums.q[v]);
    }
    return 0u;
  });
}

// Blocks of columns times ranges of rows.
template <Mask kMask, typename T, typename A, int K, typename Terms>
void sum_across(const Layout& layout, const Parameters<A, K>& parameters, const Data<T>& data, double* sums, Terms terms) {
  for (const Part& part : layout.parts) {
    const int64_t columns = part.columns, blocks = (columns + kBlock - 1) / kBlock;
    const int64_t ranges = std::clamp<int64_t>(
        part.rows * std::min(columns, kBlock) / kUnit, 1, std::max<int64_t>(1, kMaxUnits / blocks));
    std::vector<double> partial(ranges * 2 * layout.width);
    at::parallel_for(0, blocks * ranges, 1, [&](int64_t begin, int64_t end) {
      constexpr int64_t kPadded = kBlock + 2 * kGroup;
      std::vector<A> sum(2 * kPadded);
      A *first = sum.data() + kGroup, *second = first + kPadded;
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t block = unit % blocks * kBlock, n = std::min(kBlock, columns - block), range = unit / blocks;
        const View<A, K, true> view(parameters, block);
        double* out = partial.data() + range * 2 * layout.width + block;
        const int64_t stop = (range + 1) * part.rows / ranges;
        for (int64_t r = range * part.rows / ranges; r < stop;) {
          std::fill(sum.begin(), sum.end(), A(0));
          for (const int64_t r1 = std::min(stop, r + kTerms); r < r1;) {
            const Span whole = layout.row(part, r), row{whole.at + block, whole.bits + block / 8, n};
            const int64_t rows = n < kGroup ? 1 : std::min<int64_t>(r1 - r, 4);  // a padded row is one
            add_rows<kMask>(data, row, rows, part, view, terms, first, second);
            r += rows;
          }
          for (int64_t i = 0; i < n; ++i) out[i] += first[i], out[layout.width + i] += second[i];
        }
      }
    });
    fold(partial, layout, sums);
  }
}

// Adds up into sums [2, C]. terms(view, data, element, column, bits of the mask, p, q) sets the terms of a vector of elements.
template <Mask kMask, typename T, typename A, int K, typename Terms>
void sum_channels(const Layout& layout, const Parameters<A, K>& parameters, const Data<T>& data, double* sums, Terms terms) {
  if (layout.parts.empty()) return;
  if (layout.across) {
    sum_across<kMask>(layout, parameters, data, sums, terms);
  } else {
    sum_runs<kMask>(layout, parameters, data, sums, terms);
  }
}

}  // namespace syncnorm
