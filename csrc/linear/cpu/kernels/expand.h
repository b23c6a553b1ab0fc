// Expand: computes Y from a base product and the low-rank term. Include this file after the target pragma
// (cpu/target_<isa>.h).
//
// For kTokens rows and kVecs vectors of columns at a time, the sums of left · right stay in registers while the loop
// runs over all ranks. `right`, the adapter's matrix B or A in float32, is read from L2 once for every kTokens rows.
// Each element of y is written once.
#pragma once

#include "linear/cpu/kernels/row_block.h"

namespace peft_ext {
namespace {

// Computes sums = bias_before + left · right, the low-rank product with the inner bias, for kRows rows and `width`
// columns.
template <int kRows>
inline void expand_block(const Expand& expand, int64_t t, int64_t n, int64_t width, float (*sums)[kPanel]) {
  constexpr int kVecs = Vec::kWidth == 16 ? 2 : 1;
  for (int64_t j = 0; j < width; j += kVecs * Vec::kWidth) {
    Vec sum[kRows][kVecs];
    for (int v = 0; v < kVecs; ++v) {
      const float* bias = expand.bias_before;
      const Vec start = bias == nullptr ? Vec::zero() : Vec::load(bias + n + j + v * Vec::kWidth);
      for (int i = 0; i < kRows; ++i) sum[i][v] = start;
    }
    for (int64_t r = 0; r < expand.rank; ++r) {
      const float* right = expand.right + r * expand.stride + n + j;
      Vec weight[kVecs];
      for (int v = 0; v < kVecs; ++v) weight[v] = Vec::load(right + v * Vec::kWidth);
      for (int i = 0; i < kRows; ++i) {
        const Vec value = Vec::broadcast(expand.left[(t + i) * expand.rank + r]);
        for (int v = 0; v < kVecs; ++v) sum[i][v] = Vec::fma(value, weight[v], sum[i][v]);
      }
    }
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVecs; ++v) sum[i][v].store(sums[i] + j + v * Vec::kWidth);
  }
}

// Computes y = scale ∘ before in float32, without an intermediate copy. y and before may be the same memory.
void scale_rows(const Expand& expand, int64_t begin, int64_t end, int64_t first, int64_t last) {
  for (int64_t t = begin; t < end; ++t) {
    const float* from = expand.before + t * expand.columns;
    float* to = static_cast<float*>(expand.y) + t * expand.columns;
    int64_t j = first;
    for (; j + Vec::kWidth <= last; j += Vec::kWidth)
      Vec::mul(Vec::load(from + j), Vec::load(expand.scale + j)).store(to + j);
    for (; j < last; ++j) to[j] = from[j] * expand.scale[j];
  }
}

bool scales_alone(const Expand& expand) {
  return expand.dtype == DType::kF32 && expand.rank == 0 && expand.before != nullptr && expand.scale != nullptr &&
         expand.z == nullptr && expand.bias_before == nullptr && expand.bias == nullptr && expand.after == nullptr &&
         expand.residual == nullptr && !expand.dropout.active;
}

template <typename T>
void expand_range(const Expand& expand, int64_t begin, int64_t end, int64_t first, int64_t last) {
  RowBlock block;
  alignas(64) float residual[kPanel];
  const bool product_alone = expand.rank == 0 && expand.before != nullptr;
  for_token_groups(end - begin, [&](auto group, int64_t at) {
    constexpr int kRows = decltype(group)::kCount;
    const int64_t t = begin + at;
    for (int64_t n = first; n < last; n += kPanel) {
      const int64_t width = min_i64(kPanel, last - n);
      if (!product_alone) expand_block<kRows>(expand, t, n, width, block.values);
      for (int i = 0; i < kRows; ++i) {
        float* values = block.values[i];
        const int64_t flat = (t + i) * expand.columns + n;
        if (product_alone) {
          const float* bias = expand.bias_before;
          for (int64_t j = 0; j < width; ++j) values[j] = expand.before[flat + j];
          if (bias != nullptr)
            for (int64_t j = 0; j < width; ++j) values[j] = bias[n + j] + values[j];
        } else if (expand.before != nullptr) {
          for (int64_t j = 0; j < width; ++j) values[j] += expand.before[flat + j];
        }
        if (expand.z != nullptr) narrow(values, width, static_cast<T*>(expand.z) + flat);
        if (expand.scale != nullptr)
          for (int64_t j = 0; j < width; ++j) values[j] *= expand.scale[n + j];
        if (expand.dropout.active) {
          const uint16_t* draws = philox_draws(expand.dropout, flat, width, block.draws);
          apply_dropout(expand.dropout, draws, width, values);
        }
        if (expand.bias != nullptr)
          for (int64_t j = 0; j < width; ++j) values[j] += expand.bias[n + j];
        if (expand.after != nullptr)
          for (int64_t j = 0; j < width; ++j) values[j] += expand.after[flat + j];
        if (expand.residual != nullptr) {
          widen(static_cast<const T*>(expand.residual) + flat, width, residual);
          for (int64_t j = 0; j < width; ++j) values[j] += residual[j];
        }
        narrow(values, width, static_cast<T*>(expand.y) + flat);
      }
    }
  });
}

void expand(const Expand& work, int64_t begin, int64_t end, int64_t first, int64_t last) {
  if (scales_alone(work)) return scale_rows(work, begin, end, first, last);
  with_dtype(work.dtype, [&](auto zero) { expand_range<decltype(zero)>(work, begin, end, first, last); });
}

}  // namespace
}  // namespace peft_ext
