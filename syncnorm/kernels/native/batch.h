// How the operators of batch normalisation walk over a flat tensor, [N, C, S] or [M, C]: in rows of groups of elements.
//
// Either a row is a run of one channel (S elements), or it runs across the channels. Short rows are taken together: an
// [N, C, S] with small S is N rows of C·S columns, and a few rows of small C are one row, with the channels repeated.

#pragma once

#include <numeric>

#include "common.h"

namespace syncnorm {

constexpr int64_t kGroup = 16;               // elements at a time: a whole number of vectors, and of bytes of a mask
constexpr int64_t kVectors = kGroup / kLanes;
constexpr int64_t kShortRow = 512;           // columns below which rows are taken together
constexpr int64_t kBlock = 1024;             // columns at a time, so that their parameters stay in the L1 cache

struct Part {
  int64_t offset, rows, columns;  // elements
  int64_t bits;                   // offset in bytes into a mask, of which each row has whole ones
  int64_t pitch, bit_pitch;       // elements and bytes of a mask to the next row; for runs, to the next sample
  int64_t row_bits() const { return (columns + 7) / 8; }
};

// A row: its first element, first byte of the mask, and length.
struct Span {
  int64_t at, bits, n;
};

struct Layout {
  int64_t first = 0, channels, repeat = 1;  // channels from the first on
  int64_t samples, pitch;  // and elements from one sample to the next
  int64_t count;      // values of a channel
  bool across;        // rows run across the channels
  int64_t width;      // entries of a parameter: channels, or columns
  int64_t mask_bytes;
  std::vector<Part> parts;

  // A mask has whole bytes for each row: one bit an element, or 8·ceil(S/8) bits for each run of S.
  explicit Layout(const Tensor& x, bool masked = false) : Layout(x, 0, x.size(0), masked) {}

  // Samples [begin, end) alone.
  Layout(const Tensor& x, int64_t begin, int64_t end, bool masked = false) {
    TORCH_CHECK(
        x.is_contiguous() && (x.dim() == 2 || x.dim() == 3), "expected a contiguous [N, C, S] or [M, C] tensor");
    channels = x.size(1);
    int64_t rows = samples = end - begin, columns = channels;
    pitch = x.dim() == 3 ? channels * x.size(2) : channels;
    count = channels ? samples * (pitch / channels) : 0;
    const int64_t start = begin * pitch;
    across = x.dim() == 2 || x.size(2) < kGroup;
    if (x.numel() == 0) {
      rows = columns = 0;
      parts = {};
    } else if (!across) {
      const int64_t S = x.size(2);
      parts = {{start, rows * channels, S, 0, channels * S, channels * ((S + 7) / 8)}};
    } else {
      if (x.dim() == 3) columns *= repeat = x.size(2);
      int64_t joined = columns < kShortRow ? (kShortRow + columns - 1) / columns : 1;
      const int64_t whole = masked ? 8 / std::gcd(columns, int64_t{8}) : 1;  // no row ends within a byte
      joined = std::min(rows, (joined + whole - 1) / whole * whole);
      const int64_t rest = rows % joined;
      const int64_t long_row = columns * joined, row_bits = (long_row + 7) / 8;
      parts = {{start, rows / joined, long_row, 0, long_row, row_bits}};
      if (rest) parts.push_back({start + (rows - rest) * columns, 1, rest * columns, parts[0].rows * row_bits, 0, 0});
      columns = long_row;
    }
    width = across ? columns : channels;
    mask_bytes = parts.empty() ? 0 : parts.back().bits + parts.back().rows * parts.back().row_bits();
  }

  // The first element and the first byte of the mask of a row, which ends `columns` later.
  Span row(const Part& part, int64_t r) const {
    if (across) return {part.offset + r * part.pitch, part.bits + r * part.bit_pitch, part.columns};
    return run(part, r / channels, r % channels);
  }
  Span run(const Part& part, int64_t sample, int64_t channel) const {
    return {part.offset + sample * part.pitch + channel * part.columns,
            part.bits + sample * part.bit_pitch + channel * part.row_bits(), part.columns};
  }

  // Channels [c0, c1) alone, of a layout of runs.
  Layout slab(int64_t c0, int64_t c1) const {
    Layout slab = *this;
    Part& part = slab.parts[0];
    slab.first += c0, slab.channels = slab.width = c1 - c0;
    part.offset += c0 * part.columns, part.bits = c0 * part.row_bits(), part.rows = samples * slab.channels;
    return slab;
  }

  // Calls function(entry of a parameter, channel of this layout).
  template <typename F> void for_each_entry(F function) const {
    for (int64_t entry = 0; entry < width;) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t s = 0; s < repeat; ++s) function(entry++, c);
      }
    }
  }
};

// The layouts of chunks of these numbers of samples, whose statistics are their own: channels k·C to (k + 1)·C are those of the
// k-th. Without sizes all samples are one chunk.
inline std::vector<Layout> chunks_of(const Tensor& x, at::IntArrayRef sizes, bool masked) {
  if (sizes.empty()) return {Layout(x, masked)};
  TORCH_CHECK(!masked, "a mask is that of all samples together, there is none for chunks");
  std::vector<Layout> chunks;
  int64_t begin = 0;
  for (const int64_t size : sizes) {
    TORCH_CHECK(
        size > 0 && size <= x.size(0) - begin, "expected chunks of at least 1 sample that add up to ", x.size(0), ", got ", sizes);
    chunks.emplace_back(x, begin, begin + size);
    chunks.back().first = static_cast<int64_t>(chunks.size() - 1) * x.size(1);
    begin += size;
  }
  TORCH_CHECK(begin == x.size(0), "expected chunks that add up to ", x.size(0), ", got ", sizes);
  return chunks;
}

// K values per channel, in the arithmetic type, laid out for the rows of a layout.
template <typename A, int K> struct Parameters {
  int64_t stride;
  std::vector<A> data;

  // fill(c, values) sets the K values of a channel, counted from the first of all.
  template <typename F> Parameters(const Layout& layout, F fill) : stride(layout.width + 2 * kGroup), data(K * stride) {
    std::vector<A> values(layout.channels * K);
    for (int64_t c = 0; c < layout.channels; ++c) fill(layout.first + c, values.data() + c * K);
    layout.for_each_entry([&](int64_t entry, int64_t c) {
      for (int k = 0; k < K; ++k) data[k * stride + kGroup + entry] = values[c * K + k];
    });
  }
  const A* at(int k, int64_t entry) const { return data.data() + k * stride + kGroup + entry; }
};

// The parameters of one row, from its first column on: loaded at each column, or one value for all of them.
template <typename A, int K, bool kAcross> struct View {
  View(const Parameters<A, K>& parameters, int64_t entry) {
    for (int k = 0; k < K; ++k) {
      if constexpr (kAcross) {
        values[k] = parameters.at(k, entry);
      } else {
        values[k] = splat(*parameters.at(k, entry));
      }
    }
  }
  template <int k> vec_t<A> get(int64_t column) const {
    if constexpr (kAcross) {
      return load(values[k] + column);
    } else {
      return values[k];
    }
  }
  std::conditional_t<kAcross, const A*, vec_t<A>> values[K];
};

// Where an operator reads and writes, at the first element of the tensor. What it does not use is null.
template <typename T> struct Data {
  const T *x = nullptr, *grad = nullptr, *residual = nullptr;
  const uint8_t* mask = nullptr;
  T *y = nullptr, *second = nullptr;
  uint8_t* new_mask = nullptr;
};

// What an operator does with a mask.
enum class Mask { kNone, kRead, kWrite };

// The kGroup bits of a row that begin at column `start`, which may be negative; none where no mask is read.
template <Mask kMask> inline uint32_t bits_at(const uint8_t* mask, const Span& row, int64_t start) {
  if (kMask != Mask::kRead) return 0;
  mask += row.bits;
  if (start >= 0 && start % 8 == 0) return read<uint16_t>(mask + start / 8);
  const int64_t first = std::max<int64_t>(start, 0) / 8, bytes = (row.n + 7) / 8;
  uint32_t word = 0;
  for (int64_t b = 0; b < 3 && first + b < bytes; ++b) word |= static_cast<uint32_t>(mask[first + b]) << (8 * b);
  return (start < 0 ? word << -start : word >> (start - 8 * first)) & 0xffff;
}

// Calls body(data, element, column, bits of the mask, skip) for groups that cover a row. The last group is moved back to
// end with the row: its first `skip` elements have been seen. A row shorter than a group is copied into one that ends with
// it. What the body returns are bits for the new mask.
template <Mask kMask, typename T, typename Body>
inline __attribute__((always_inline)) void cover(const Data<T>& data, const Span& row, Body body) {
  int64_t i = 0;
  for (; i + kGroup <= row.n; i += kGroup) {
    const uint32_t bits = body(data, row.at + i, i, bits_at<kMask>(data.mask, row, i), 0);
    if (kMask == Mask::kWrite) write<uint16_t>(data.new_mask + row.bits + i / 8, bits);
  }
  if (i == row.n) return;
  const int64_t start = row.n - kGroup, skip = i - start, at = row.at + start;
  T groups[5][kGroup];
  Data<T> padded;
  if (start < 0) {
    std::memset(groups, 0, sizeof(groups));
    padded = data;
    int used = 0;
    for (const T** p : {&padded.x, &padded.grad, &padded.residual}) {
      if (!*p) continue;
      std::copy_n(*p + row.at, row.n, groups[used] + skip);
      *p = groups[used++] - at;
    }
    if (data.y) padded.y = groups[3] - at;
    if (data.second) padded.second = groups[4] - at;
  }
  const uint32_t bits = body(start < 0 ? padded : data, at, start, bits_at<kMask>(data.mask, row, start), skip);
  if (start < 0) {
    if (data.y) std::copy_n(groups[3] + skip, row.n, data.y + row.at);
    if (data.second) std::copy_n(groups[4] + skip, row.n, data.second + row.at);
  }
  for (int64_t b = 0; kMask == Mask::kWrite && 8 * b < row.n - i; ++b) {
    data.new_mask[row.bits + i / 8 + b] = bits >> (skip + 8 * b);
  }
}

// ---- Elementwise: body(view, data, element, column, bits) for all groups of all rows. ----

template <bool kAcross, Mask kMask, typename T, typename A, int K, typename Body>
void for_each_group(const Layout& layout, const Parameters<A, K>& parameters, const Data<T>& data, Body body) {
  for (const Part& part : layout.parts) {
    const int64_t grain = std::max<int64_t>(1, kUnit / part.columns);
    at::parallel_for(0, part.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = 0; block < part.columns; block += kAcross ? kBlock : part.columns) {
        const int64_t n = kAcross ? std::min(kBlock, part.columns - block) : part.columns;
        for (int64_t r = begin; r < end; ++r) {
          const View<A, K, kAcross> view(parameters, kAcross ? block : r % layout.channels);
          const Span whole = layout.row(part, r), row{whole.at + block, whole.bits + block / 8, n};
          cover<kMask>(data, row, [&](const Data<T>& from, int64_t at, int64_t i, uint32_t bits, int64_t) {
            return body(view, from, at, i, bits);
          });
        }
      }
      end_streaming();
    });
  }
}

}  // namespace syncnorm
