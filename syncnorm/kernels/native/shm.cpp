// The sum of one row per rank over memory that the ranks of one host share (syncnorm/distributed/wire/shm.py maps it).
//
// Every rank has a line of control words and two slots. Exchange number k writes slot k % 2, then says so by setting its
// sequence number to k, then waits for the others to say it, and adds up the slots in the order of the ranks, which gives
// all of them the same bits. Two slots suffice and no second wait is needed: who writes number k + 2 has seen everyone's
// k + 1, and who has said k + 1 has read all of k. A row longer than a slot goes through in pieces.
//
// No call waits longer than a moment: it returns the rank that it misses, and the caller looks whether that one still
// lives, whether the user wants to stop, and comes back.

#include <ATen/ATen.h>
#include <torch/library.h>

#ifdef __linux__

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <ctime>

namespace {

constexpr int64_t kDone = -1;
constexpr int64_t kMismatch = -2;
constexpr int64_t kMoment = 50'000'000;  // ns in the kernel before the caller looks after a missing rank
// Pure spinning until the futex took 59 µs an exchange: the scheduler had packed both ranks onto one core, and who spins
// there keeps the other from coming. Yielding in between lets it come.
constexpr int kSpins = 200, kYields = 200;

struct alignas(128) Line {  // 128: the prefetcher takes cache lines in pairs
  std::atomic<uint32_t> sequence;
  std::atomic<uint32_t> waiters;
  uint32_t left;  // set by the caller: this rank will not come again
  uint32_t probe;
  int64_t words[2];  // length of the whole row, by slot
};
static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(Line) == 128);

struct State {  // of one rank, kept by the caller between calls; seven int64
  Line* lines;
  double* slots;
  int64_t rank, size, capacity;
  int64_t sequence;  // of the exchange under way, from 1
  int64_t offset;    // words of the row that are done
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

bool arrived(const Line& line, uint32_t sequence) {
  return static_cast<int32_t>(line.sequence.load(std::memory_order_acquire) - sequence) >= 0;
}

void publish(Line& line, uint32_t sequence) {
  line.sequence.store(sequence);  // sequentially consistent with the waiter, who counts itself and then looks once more
  if (line.waiters.load()) syscall(SYS_futex, &line.sequence, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

bool await(Line& line, uint32_t sequence) {
  for (int i = 0; i < kSpins; ++i, pause())
    if (arrived(line, sequence)) return true;
  for (int i = 0; i < kYields; ++i, sched_yield())
    if (arrived(line, sequence)) return true;
  line.waiters.fetch_add(1);
  const uint32_t seen = line.sequence.load();
  if (!arrived(line, sequence)) {
    const timespec moment{0, kMoment};
    syscall(SYS_futex, &line.sequence, FUTEX_WAIT, seen, &moment, nullptr, 0);  // woken, timed out, interrupted: all alike
  }
  line.waiters.fetch_sub(1);
  return arrived(line, sequence);
}

void add_up(const State& s, int64_t parity, double* out, int64_t words) {
  const double* first = s.slots + parity * s.capacity;
  const int64_t stride = 2 * s.capacity;  // from one rank's slot to the next rank's
  constexpr int64_t kBlock = 1024;        // words whose sum stays in the first cache
  for (int64_t begin = 0; begin < words; begin += kBlock) {
    const int64_t end = std::min(words, begin + kBlock);
    for (int64_t i = begin; i < end; ++i) out[i] = first[i] + first[stride + i];
    for (int64_t r = 2; r < s.size; ++r)
      for (int64_t i = begin; i < end; ++i) out[i] += first[r * stride + i];
  }
}

// Sums `row` in place. Returns kDone, kMismatch if ranks brought rows of different lengths, or the first rank that has
// not come, after which the same call again goes on where this one stopped.
int64_t shm_sum(at::Tensor row, int64_t handle) {
  State& s = *reinterpret_cast<State*>(handle);
  TORCH_CHECK(row.scalar_type() == at::kDouble && row.is_contiguous(), "a row is contiguous float64");
  double* data = row.mutable_data_ptr<double>();
  const int64_t total = row.numel();
  do {
    const int64_t parity = s.sequence & 1, words = std::min(s.capacity, total - s.offset);
    const auto sequence = static_cast<uint32_t>(s.sequence);
    std::copy_n(data + s.offset, words, s.slots + (2 * s.rank + parity) * s.capacity);
    s.lines[s.rank].words[parity] = total;
    publish(s.lines[s.rank], sequence);  // once more the same, where this call goes on with an exchange
    for (int64_t r = 0; r < s.size; ++r)
      if (r != s.rank && !await(s.lines[r], sequence)) return r;
    ++s.sequence;
    for (int64_t r = 0; r < s.size; ++r)
      if (s.lines[r].words[parity] != total) return kMismatch;  // in the first piece, so nothing is under way
    add_up(s, parity, data + s.offset, words);
    s.offset += words;
  } while (s.offset < total);
  s.offset = 0;
  return kDone;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(syncnorm, m) {
  m.def("shm_sum(Tensor(a!) row, int handle) -> int");
  m.def("shm_resume(Tensor(a!) row, int handle) -> int");  // the same: of two names a profiler counts one
}

TORCH_LIBRARY_IMPL(syncnorm, CPU, m) {
  m.impl("shm_sum", shm_sum);
  m.impl("shm_resume", shm_sum);
}

#endif
