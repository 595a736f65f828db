// The row that ranks exchange: what is summed, zeros, and words at its end; packed in one call, read in one call.
// syncnorm/distributed/row.py says the same in torch's operations, syncnorm/core/moments.py what the sums of moments are.

#include "operators.h"

namespace syncnorm {
namespace {

// A row whose first `used` words are still to be written.
Tensor begin_row(const Tensor& like, int64_t used, int64_t width, Words words) {
  const int64_t end = width - static_cast<int64_t>(words.size());
  TORCH_CHECK(used <= end, "a row of ", width, " has no room for ", used, " words and ", words.size());
  Tensor row = at::empty({width}, like.options());
  double* out = row.data_ptr<double>();
  std::fill(out + used, out + end, 0.0);
  std::copy(words.begin(), words.end(), out + end);
  return row;
}

std::vector<double> last(const Tensor& row, int64_t num_words) {
  const double* end = row.const_data_ptr<double>() + row.numel();
  return {end - num_words, end};
}

}  // namespace

Tensor pack_moments(const Tensor& mean, const Tensor& m2, double count, int64_t width, Words words) {
  const int64_t C = mean.numel();
  const double *mp = doubles(mean), *qp = doubles(m2);
  Tensor row = begin_row(mean, 2 * C + 1, width, words);
  double *out = row.data_ptr<double>(), *total = out + 1, *squares = total + C;
  *out = count;
  for (int64_t c = 0; c < C; ++c) {
    total[c] = mp[c] * count;
    squares[c] = qp[c] + total[c] * mp[c];
  }
  return row;
}

Tensor pack_sums(const Tensor& sums, int64_t width, Words words) {
  const Tensor dense = sums.contiguous();
  const double* in = doubles(dense);
  Tensor row = begin_row(sums, sums.numel(), width, words);
  std::copy_n(in, sums.numel(), row.data_ptr<double>());
  return row;
}

// Mean and M2 of the whole, its count, and the last words.
std::tuple<Tensor, Tensor, double, std::vector<double>> read_moments(const Tensor& row, int64_t C, int64_t num_words) {
  const double* in = doubles(row);
  TORCH_CHECK(2 * C + 1 + num_words <= row.numel(), "no moments of ", C, " channels in a row of ", row.numel());
  const double *total = in + 1, *squares = total + C, count = std::max(*in, 1.0);
  Tensor mean = at::empty({C}, row.options()), m2 = at::empty({C}, row.options());
  double *mp = mean.data_ptr<double>(), *qp = m2.data_ptr<double>();
  for (int64_t c = 0; c < C; ++c) {
    mp[c] = total[c] / count;
    const double squared = squares[c] - total[c] * mp[c];
    qp[c] = squared < 0 ? 0 : squared;  // NaN stays NaN
  }
  return {mean, m2, *in, last(row, num_words)};
}

// What was summed, in its shape and over the divisor if there is one, and the last words.
std::tuple<Tensor, std::vector<double>> read_sums(
    const Tensor& row, at::IntArrayRef shape, std::optional<double> divisor, int64_t num_words) {
  const double* in = doubles(row);
  Tensor sums = at::empty(shape, row.options());
  TORCH_CHECK(sums.numel() + num_words <= row.numel(), "no ", sums.numel(), " sums in a row of ", row.numel());
  double *out = sums.data_ptr<double>(), over = divisor.value_or(1);
  for (int64_t i = 0; i < sums.numel(); ++i) out[i] = in[i] / over;
  return {sums, last(row, num_words)};
}

TORCH_LIBRARY_FRAGMENT(syncnorm, m) {
  m.def("pack_moments(Tensor mean, Tensor m2, float count, int width, float[] words) -> Tensor");
  m.def("pack_sums(Tensor sums, int width, float[] words) -> Tensor");
  m.def("read_moments(Tensor row, int channels, int num_words) -> (Tensor, Tensor, float, float[])");
  m.def("read_sums(Tensor row, int[] shape, float? divisor, int num_words) -> (Tensor, float[])");
}

TORCH_LIBRARY_IMPL(syncnorm, CPU, m) {
  m.impl("pack_moments", pack_moments);
  m.impl("pack_sums", pack_sums);
  m.impl("read_moments", read_moments);
  m.impl("read_sums", read_sums);
}

}  // namespace syncnorm
