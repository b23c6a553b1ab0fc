// Dropped: float32 products with the few elements that dropout drops. Include this file after the target pragma
// (cpu/target_<isa>.h).
//
// W is given transposed: each row in memory is a column of W. A strip has kDroppedStrip rows or columns of W, and stays
// in cache while a call multiplies the strip with the call's tokens. For each dropped element, dropped_product adds one
// multiple of a row of the strip, and dropped_dots computes one dot product with a row of the strip.
#pragma once

#include "cpu/row_loop.h"
#include "linear/cpu/kernels/row_block.h"

namespace peft_ext {
namespace {

// Calls f(column) for each column of [begin, end) that dropout drops for the token. begin is a multiple of 32.
template <typename F>
inline void for_dropped(const Dropped& work, int64_t token, int64_t begin, int64_t end, const F& f) {
  for (int64_t k = begin; k < end; k += 32) {
    const uint32_t inside = end - k >= 32 ? 0xffffffffu : (1u << (end - k)) - 1;
    uint32_t left = ~work.keep[token * work.keep_words + k / 32] & inside;
    for (; left != 0; left &= left - 1) f(k + __builtin_ctz(left));
  }
}

template <typename T>
void dropped_product_range(const Dropped& work, int64_t row, int64_t begin, int64_t end) {
  constexpr int kVecs = static_cast<int>(kDroppedStrip) / Vec::kWidth;
  const int64_t width = min_i64(kDroppedStrip, work.rows - row);
  const float* strip = work.turned + row;
  alignas(64) float sums[kDroppedStrip];
  for (int64_t t = begin; t < end; ++t) {
    const T* values = static_cast<const T*>(work.m) + t * work.m_stride;
    Vec sum[kVecs];
    for (int v = 0; v < kVecs; ++v) sum[v] = Vec::zero();
    for_dropped(work, t, 0, work.columns, [&](int64_t k) {
      const Vec value = Vec::broadcast(to_float(values[k]));
      const float* weights = strip + k * work.stride;
      for (int v = 0; v < kVecs; ++v) sum[v] = Vec::fma(value, Vec::load(weights + v * Vec::kWidth), sum[v]);
    });
    for (int v = 0; v < kVecs; ++v) sum[v].store(sums + v * Vec::kWidth);
    float* out = work.out + t * work.out_stride + row;
    for (int64_t j = 0; j < width; ++j) out[j] += sums[j];
  }
}

void dropped_product(const Dropped& work, int64_t row, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto zero) { dropped_product_range<decltype(zero)>(work, row, begin, end); });
}

template <typename T>
void dropped_dots_range(const Dropped& work, int64_t column, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const T* values = static_cast<const T*>(work.m) + t * work.m_stride;
    float* out = work.out + t * work.out_stride;
    for_dropped(work, t, column, min_i64(work.columns, column + kDroppedStrip), [&](int64_t k) {
      const float* weights = work.turned + k * work.stride;
      float sum[1];
      sum_vectors(work.rows, sum, [&](auto lanes, int64_t n, Vec* sums) {
        sums[0] = Vec::fma(lanes.load(values + n), lanes.load(weights + n), sums[0]);
      });
      out[k] = work.accumulate ? out[k] + sum[0] : sum[0];
    });
  }
}

void dropped_dots(const Dropped& work, int64_t column, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto zero) { dropped_dots_range<decltype(zero)>(work, column, begin, end); });
}

}  // namespace
}  // namespace peft_ext
