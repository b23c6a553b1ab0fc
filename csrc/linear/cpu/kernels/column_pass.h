// ColumnPass: scales the columns of a matrix m, and sums over the rows the products of m with a second matrix, in one
// pass over m. Include this file after the target pragma (cpu/target_<isa>.h).
#pragma once

#include <type_traits>

#include "linear/cpu/kernels/row_block.h"

namespace peft_ext {
namespace {

// Computes only ColumnPass::sums, for float32 matrices, without an intermediate copy. sum_columns reads four rows of
// both matrices at a time, and adds each column's products in the order of the rows.
void sum_columns(const ColumnPass& pass, int64_t begin, int64_t end) {
  constexpr int kRows = 4;
  const auto* m = static_cast<const float*>(pass.m);
  const auto* other = static_cast<const float*>(pass.other);
  int64_t t = begin;
  const auto rows = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    for (int64_t k = 0; k < pass.columns; k += Vec::kWidth) {
      if (k + Vec::kWidth <= pass.columns) {
        Vec sum = Vec::load(pass.sums + k);
        for (int i = 0; i < kCount; ++i) {
          const int64_t flat = (t + i) * pass.columns + k;
          sum = Vec::fma(Vec::load(m + flat), Vec::load(other + flat), sum);
        }
        sum.store(pass.sums + k);
        continue;
      }
      for (int64_t j = k; j < pass.columns; ++j)
        for (int i = 0; i < kCount; ++i)
          pass.sums[j] += m[(t + i) * pass.columns + j] * other[(t + i) * pass.columns + j];
    }
    t += kCount;
  };
  while (t + kRows <= end) rows(std::integral_constant<int, kRows>());
  while (t < end) rows(std::integral_constant<int, 1>());
}

template <typename T, typename Other>
void column_range(const ColumnPass& pass, int64_t begin, int64_t end) {
  alignas(64) float m[kPanel], other[kPanel];
  for (int64_t k = 0; k < pass.columns; k += kPanel) {
    const int64_t width = min_i64(kPanel, pass.columns - k);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t flat = t * pass.columns + k;
      widen(static_cast<const T*>(pass.m) + flat, width, m);
      if (pass.sums != nullptr) {
        float* sums = pass.sums + k;
        widen(static_cast<const Other*>(pass.other) + flat, width, other);
        int64_t j = 0;
        for (; j + Vec::kWidth <= width; j += Vec::kWidth)
          Vec::fma(Vec::load(m + j), Vec::load(other + j), Vec::load(sums + j)).store(sums + j);
        for (; j < width; ++j) sums[j] += m[j] * other[j];
      }
      if (pass.out == nullptr) continue;
      for (int64_t j = 0; j < width; ++j) m[j] *= pass.scale[k + j] + pass.shift;
      narrow(m, width, static_cast<T*>(pass.out) + flat);
    }
  }
}

// Computes only the scaled matrix `out`, for a float32 matrix m, without an intermediate copy.
void scale_columns(const ColumnPass& pass, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const float* from = static_cast<const float*>(pass.m) + t * pass.columns;
    float* to = static_cast<float*>(pass.out) + t * pass.columns;
    const Vec shift = Vec::broadcast(pass.shift);
    int64_t j = 0;
    for (; j + Vec::kWidth <= pass.columns; j += Vec::kWidth)
      Vec::mul(Vec::load(from + j), Vec::add(Vec::load(pass.scale + j), shift)).store(to + j);
    for (; j < pass.columns; ++j) to[j] = from[j] * (pass.scale[j] + pass.shift);
  }
}

void column_pass(const ColumnPass& pass, int64_t begin, int64_t end) {
  if (pass.dtype == DType::kF32 && pass.sums == nullptr) return scale_columns(pass, begin, end);
  if (pass.dtype == DType::kF32 && pass.other_dtype == DType::kF32 && pass.out == nullptr)
    return sum_columns(pass, begin, end);
  with_dtype(pass.dtype, [&](auto zero) {
    with_dtype(pass.other_dtype, [&](auto other) { column_range<decltype(zero), decltype(other)>(pass, begin, end); });
  });
}

}  // namespace
}  // namespace peft_ext
