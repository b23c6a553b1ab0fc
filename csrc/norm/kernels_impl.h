// The norm kernels of norm/kernels.h for one instruction set. Include this file after the target pragma
// (cpu/target_<isa>.h) and Vec (cpu/simd_<isa>.h).
#pragma once

#include "cpu/row_loop.h"
#include "norm/kernels.h"

namespace peft_ext {
namespace {

template <bool kCentered, typename T, typename Out>
void norm_row(const NormRows& work, int64_t row) {
  const int64_t columns = work.columns;
  const float count = static_cast<float>(columns);
  const T* x = static_cast<const T*>(work.x) + row * columns;
  Out* y = static_cast<Out*>(work.y) + row * columns;
  float sum[1], mean = 0.0f;
  if (kCentered) {
    sum_vectors(columns, sum,
                [&](auto lanes, int64_t k, Vec(&sums)[1]) { sums[0] = Vec::add(lanes.load(x + k), sums[0]); });
    work.mean[row] = mean = sum[0] / count;
  }
  const Vec center = Vec::broadcast(mean);
  sum_vectors(columns, sum, [&](auto lanes, int64_t k, Vec(&sums)[1]) {
    Vec value = lanes.load(x + k);
    if (kCentered) value = lanes.only(Vec::sub(value, center));
    sums[0] = Vec::fma(value, value, sums[0]);
  });
  const float rstd = 1.0f / __builtin_sqrtf(sum[0] / count + work.eps);
  work.rstd[row] = rstd;
  const Vec scale = Vec::broadcast(rstd);
  // The fields factor, bias and round_first are copied to local variables, because the compiler must assume that a
  // store to `y` may change `work`.
  const float *factor = work.factor, *bias = work.bias;
  const bool round_first = work.round_first;
  for_vectors(columns, [=](auto lanes, int64_t k) {
    Vec value = lanes.load(x + k);
    if (kCentered) value = Vec::sub(value, center);
    value = Vec::mul(value, scale);
    if (round_first) value = value.template rounded<T>();
    if (factor != nullptr) value = Vec::mul(value, lanes.load(factor + k));
    if (bias != nullptr) value = Vec::add(value, lanes.load(bias + k));
    lanes.store(y + k, value);
  });
}

template <bool kCentered, typename T, typename Grad>
void norm_gradient_row(const NormGradient& work, int64_t row) {
  const int64_t columns = work.columns;
  const float count = static_cast<float>(columns), rstd = work.rstd[row];
  const T* x = static_cast<const T*>(work.x) + row * columns;
  const Grad* grad = static_cast<const Grad*>(work.grad) + row * columns;
  const Vec scale = Vec::broadcast(rstd), center = Vec::broadcast(kCentered ? work.mean[row] : 0.0f);
  const auto normed = [=](auto lanes, int64_t k) {
    const Vec value = lanes.load(x + k);
    return Vec::mul(kCentered ? Vec::sub(value, center) : value, scale);
  };
  const float* factor = work.factor;
  const auto weighted = [=](auto lanes, int64_t k, Vec value) {
    return factor == nullptr ? value : Vec::mul(value, lanes.load(factor + k));
  };
  float sum[2] = {0.0f, 0.0f};  // sums over the row of g ∘ x̂ and of g
  if (work.grad_x != nullptr) {
    sum_vectors(columns, sum, [&](auto lanes, int64_t k, Vec(&sums)[2]) {
      const Vec g = weighted(lanes, k, lanes.load(grad + k));
      sums[0] = Vec::fma(g, normed(lanes, k), sums[0]);
      if (kCentered) sums[1] = Vec::add(g, sums[1]);
    });
  }
  const Vec along = Vec::broadcast(sum[0] / count), shift = Vec::broadcast(sum[1] / count);
  T* grad_x = static_cast<T*>(work.grad_x);
  if (grad_x != nullptr) grad_x += row * columns;
  float *grad_weight = work.grad_weight, *grad_bias = work.grad_bias;
  for_vectors(columns, [=](auto lanes, int64_t k) {
    const Vec dy = lanes.load(grad + k), x_hat = normed(lanes, k);
    if (grad_x != nullptr) {
      Vec dx = weighted(lanes, k, dy);
      if (kCentered) dx = Vec::sub(dx, shift);
      lanes.store(grad_x + k, Vec::mul(Vec::sub(dx, Vec::mul(x_hat, along)), scale));
    }
    if (grad_weight != nullptr) lanes.store(grad_weight + k, Vec::fma(dy, x_hat, lanes.load(grad_weight + k)));
    if (grad_bias != nullptr) lanes.store(grad_bias + k, Vec::add(dy, lanes.load(grad_bias + k)));
  });
}

// Calls f with a zero of the C++ type of `dtype` and a zero of the C++ type of `other`, which is `dtype` or float32.
template <typename F>
void with_own_or_float(DType dtype, DType other, const F& f) {
  with_dtype(dtype, [&](auto zero) {
    if (other == DType::kF32)
      f(zero, 0.0f);
    else
      f(zero, zero);
  });
}

void norm_rows(const NormRows& work, int64_t begin, int64_t end) {
  with_own_or_float(work.dtype, work.out_dtype, [&](auto zero, auto out) {
    using T = decltype(zero);
    using Out = decltype(out);
    for (int64_t row = begin; row < end; ++row)
      work.centered ? norm_row<true, T, Out>(work, row) : norm_row<false, T, Out>(work, row);
  });
}

void norm_gradient(const NormGradient& work, int64_t begin, int64_t end) {
  with_own_or_float(work.dtype, work.grad_dtype, [&](auto zero, auto grad) {
    using T = decltype(zero);
    using Grad = decltype(grad);
    for (int64_t row = begin; row < end; ++row)
      work.centered ? norm_gradient_row<true, T, Grad>(work, row) : norm_gradient_row<false, T, Grad>(work, row);
  });
}

}  // namespace
}  // namespace peft_ext
