// Operators that others are made of.

#pragma once

#include "common.h"

namespace syncnorm {

using Words = at::ArrayRef<double>;

// batch_forward.cpp, batch_backward.cpp
std::tuple<Tensor, Tensor> batch_moments(const Tensor& x);
Tensor batch_normalize(
    const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight, const OptTensor& bias,
    int64_t activation, double slope, const OptTensor& residual);
std::tuple<Tensor, Tensor> batch_normalize_masked(
    const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight, const OptTensor& bias,
    int64_t activation, double slope, const Tensor& residual);
Tensor batch_backward_reduce(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight,
    const OptTensor& bias, int64_t activation, double slope, const OptTensor& side);
Tensor batch_backward_input(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight,
    const OptTensor& bias, const Tensor& means, int64_t activation, double slope, const OptTensor& side);
std::tuple<Tensor, Tensor> batch_backward_input_and_residual(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptTensor& weight,
    const OptTensor& bias, const Tensor& means, int64_t activation, double slope, const OptTensor& side);

// The gradients of bias and weight from Σg' and Σg'·x̂ of each chunk: in the dtype of the weight, or float64 without one.
std::tuple<Tensor, Tensor> affine_gradients(const double* sums, int64_t chunks, const Tensor& x, const OptTensor& weight);

// vectors.cpp
Tensor inverse_std(const Tensor& m2, double count, double eps);

// exchange_row.cpp
Tensor pack_moments(const Tensor& mean, const Tensor& m2, double count, int64_t width, Words words);
Tensor pack_sums(const Tensor& sums, int64_t width, Words words);
std::tuple<Tensor, Tensor, double, std::vector<double>> read_moments(const Tensor& row, int64_t C, int64_t num_words);
std::tuple<Tensor, std::vector<double>> read_sums(
    const Tensor& row, at::IntArrayRef shape, std::optional<double> divisor, int64_t num_words);

}  // namespace syncnorm
