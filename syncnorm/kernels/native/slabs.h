// Where nothing stands between two passes over a tensor, they are made slab by slab: a range of channels that the second
// pass still finds in its core's L2 cache. One pass over memory forward and one backward, where ranks that meet cost two.

#pragma once

#include "batch.h"

namespace syncnorm {

constexpr int64_t kSlabBytes = int64_t{1} << 20;  // of what the passes read of a channel, at most; half of it for several
constexpr int64_t kSlabs = 16;                    // at least, so that they keep many threads busy

// The layouts of slabs that together are a tensor; all of it where it is small, where few channels fill the cache, or where
// rows run across the channels: a slab of them would be a cache line here and there (2 to 2.5 times the time at C = 256).
template <typename T> std::vector<Layout> slabs_of(const Layout& whole, int64_t tensors) {
  const int64_t C = whole.channels, bytes = whole.count * sizeof(T) * tensors;  // of a channel
  if (whole.across || C < kSlabs || bytes > kSlabBytes || bytes * C <= kSlabBytes) return {whole};
  const int64_t width = std::clamp<int64_t>(kSlabBytes / 2 / bytes, 1, C / kSlabs);
  std::vector<Layout> slabs;
  for (int64_t c = 0; c < C; c += width) slabs.push_back(whole.slab(c, std::min(C, c + width)));
  return slabs;
}

// Whether the second pass finds in the cache what the first has read, so that lines of results, too, can be asked for then.
template <typename T> bool stays(const Layout& slab, int64_t tensors) {
  int64_t elements = 0;
  for (const Part& part : slab.parts) elements += part.rows * part.columns;
  return elements * static_cast<int64_t>(sizeof(T)) * tensors <= kSlabBytes;
}

// body(layout) for each slab of each chunk. The threads share out slabs that are many, or small. A few large ones, as chunks of
// a single slab each may be, share their passes out among the threads, one after another.
template <typename T, typename Body> void for_each_slab(const std::vector<Layout>& chunks, int64_t tensors, Body body) {
  std::vector<Layout> slabs;
  int64_t elements = 0;
  for (const Layout& chunk : chunks) {
    const std::vector<Layout> more = slabs_of<T>(chunk, tensors);
    slabs.insert(slabs.end(), more.begin(), more.end());
    elements += chunk.count * chunk.channels;
  }
  const int64_t number = slabs.size();
  if (number == 1 || (number < kSlabs && elements > number * kUnit)) {
    for (const Layout& slab : slabs) body(slab);
    return;
  }
  at::parallel_for(0, number, elements > kUnit ? 1 : number, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(slabs[i]);
  });
}

}  // namespace syncnorm
