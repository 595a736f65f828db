// The walk of one rank among others, in two calls each way: all up to the row that it brings, and all after the sum of rows.

#include "activation.h"
#include "operators.h"

namespace syncnorm {
namespace {

Tensor batch_forward_row(const Tensor& x, int64_t width, Words words) {
  const auto [mean, m2] = batch_moments(x);
  return pack_moments(mean, m2, static_cast<double>(x.numel() / x.size(1)), width, words);
}

// y, mean, M2, 1/std, the mask (no bytes where none is needed), the count, and the last words of the row.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, double, std::vector<double>> batch_forward_rest(
    const Tensor& row, int64_t num_words, const Tensor& x, const OptTensor& weight, const OptTensor& bias, double eps,
    int64_t activation, double slope, const OptTensor& residual) {
  auto [mean, m2, count, words] = read_moments(row, x.size(1), num_words);
  const Tensor rstd = inverse_std(m2, count, eps);
  Tensor y, mask;
  if (residual && Activation(activation, slope).shape() == Shape::kPiecewise) {
    std::tie(y, mask) = batch_normalize_masked(x, mean, rstd, weight, bias, activation, slope, *residual);
  } else {
    y = batch_normalize(x, mean, rstd, weight, bias, activation, slope, residual);
    mask = at::empty({0}, x.options().dtype(at::kByte));
  }
  return {y, mean, m2, rstd, mask, count, std::move(words)};
}

// The row, and the gradients of bias and weight: in the dtype of the weight, or float64 without one.
std::tuple<Tensor, Tensor, Tensor> batch_backward_row(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight,
    const OptTensor& bias, int64_t activation, double slope, const OptTensor& side, int64_t width, Words words) {
  const Tensor sums = batch_backward_reduce(grad, x, mean, rstd, weight, bias, activation, slope, side);
  auto [dbias, dweight] = affine_gradients(doubles(sums), 1, x, weight);
  return {pack_sums(sums, width, words), dbias, dweight};
}

// dx, g' for the residual (no elements where it is not asked for), and the last words of the row.
std::tuple<Tensor, Tensor, std::vector<double>> batch_backward_rest(
    const Tensor& row, int64_t num_words, double count, const Tensor& grad, const Tensor& x, const Tensor& mean,
    const Tensor& rstd, const OptTensor& weight, const OptTensor& bias, int64_t activation, double slope,
    const OptTensor& side, bool needs_residual) {
  auto [means, words] = read_sums(row, {2, x.size(1)}, count, num_words);
  Tensor dx, dresidual;
  if (needs_residual) {
    std::tie(dx, dresidual) =
        batch_backward_input_and_residual(grad, x, mean, rstd, weight, bias, means, activation, slope, side);
  } else {
    dx = batch_backward_input(grad, x, mean, rstd, weight, bias, means, activation, slope, side);
    dresidual = at::empty({0}, x.options());
  }
  return {dx, dresidual, std::move(words)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(syncnorm, m) {
  m.def("batch_forward_row(Tensor x, int width, float[] words) -> Tensor");
  m.def(
      "batch_forward_rest(Tensor row, int num_words, Tensor x, Tensor? weight, Tensor? bias, float eps, int activation, "
      "float slope, Tensor? residual) -> (Tensor, Tensor, Tensor, Tensor, Tensor, float, float[])");
  m.def(
      "batch_backward_row(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int activation, "
      "float slope, Tensor? side, int width, float[] words) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_backward_rest(Tensor row, int num_words, float count, Tensor grad, Tensor x, Tensor mean, Tensor rstd, "
      "Tensor? weight, Tensor? bias, int activation, float slope, Tensor? side, bool needs_residual) -> "
      "(Tensor, Tensor, float[])");
}

TORCH_LIBRARY_IMPL(syncnorm, CPU, m) {
  m.impl("batch_forward_row", batch_forward_row);
  m.impl("batch_forward_rest", batch_forward_rest);
  m.impl("batch_backward_row", batch_backward_row);
  m.impl("batch_backward_rest", batch_backward_rest);
}

}  // namespace syncnorm
