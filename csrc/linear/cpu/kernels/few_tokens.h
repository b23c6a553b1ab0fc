// FewTokens: multiplies few tokens with the rows of a matrix. for_token_groups divides the tokens into groups, and each
// row of the matrix is read once for each group. Include this file after the target pragma (cpu/target_<isa>.h).
#pragma once

#include "cpu/prefetch.h"
#include "cpu/token_groups.h"
#include "linear/cpu/kernels/row_block.h"

namespace peft_ext {
namespace {

// Tails holds for each of kCount tokens the values of the token's row of x after the row's last whole vector, padded
// with zeros.
template <int kCount>
using Tails = float[kCount][Vec::kWidth];

// Returns `count` values of x in float32: x itself, or a converted copy in `buffer`.
inline const float* widened(const float* x, int64_t, float*) { return x; }
template <typename T>
inline const float* widened(const T* x, int64_t count, float* buffer) {
  widen(x, count, buffer);
  return buffer;
}

// Computes the dot products of one row of the matrix with each token. For a row as short as a row of B, whose length is
// the rank, adding up the vectors of sums takes most of the time. Therefore only those vectors of sums to which
// products were added are added up.
template <typename T, int kCount>
inline void few_tokens_row(const FewTokens& work, const T* row, const float* x, const Tails<kCount>& tails,
                           float* sums) {
  // With fewer than four tokens, each token has several independent sums, because each addition to a sum must wait for
  // the previous addition.
  constexpr int kSums = kCount >= 4 ? 1 : 4;
  constexpr int kStep = kSums * Vec::kWidth;
  static_assert(kPanel % kStep == 0, "the tail is the last panel's");
  const int64_t ahead = prefetch_distance(work.columns * static_cast<int64_t>(sizeof(T)));
  alignas(64) float buffer[kPanel];
  Vec sum[kCount][kSums];
#pragma GCC unroll 8
  for (int t = 0; t < kCount; ++t)
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) sum[t][i] = Vec::zero();
  for (int64_t k = 0; k < work.columns; k += kPanel) {
    const int64_t width = min_i64(kPanel, work.columns - k);
    prefetch(row + k, width, ahead);
    const float* w = widened(row + k, width, buffer);
    int64_t j = 0;
    for (; j + kStep <= width; j += kStep)
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) {
        const Vec weight = Vec::load(w + j + i * Vec::kWidth);
#pragma GCC unroll 8
        for (int t = 0; t < kCount; ++t)
          sum[t][i] = Vec::fma(weight, Vec::load(x + t * work.columns + k + j + i * Vec::kWidth), sum[t][i]);
      }
    for (; j + Vec::kWidth <= width; j += Vec::kWidth) {
      const Vec weight = Vec::load(w + j);
#pragma GCC unroll 8
      for (int t = 0; t < kCount; ++t) sum[t][0] = Vec::fma(weight, Vec::load(x + t * work.columns + k + j), sum[t][0]);
    }
    if (j == width) continue;
    alignas(64) float rest[Vec::kWidth] = {};
    for (int64_t i = j; i < width; ++i) rest[i - j] = w[i];
    const Vec weight = Vec::load(rest);
#pragma GCC unroll 8
    for (int t = 0; t < kCount; ++t) sum[t][0] = Vec::fma(weight, Vec::load(tails[t]), sum[t][0]);
  }
  const bool several = work.columns >= kStep;
#pragma GCC unroll 8
  for (int t = 0; t < kCount; ++t) {
    Vec total = sum[t][0];
    if (several)
#pragma GCC unroll 4
      for (int i = 1; i < kSums; ++i) total = Vec::add(total, sum[t][i]);
    sums[t] = total.sum();
  }
}

// Multiplies few tokens with the rows [begin, end) of a float32 matrix whose rows have kVecs vectors, such as lora_B.
// few_tokens_short_rows keeps x in registers, and has no loop over the columns. The results have the same bits as those
// of few_tokens_row.
template <int kCount, int kVecs>
void few_tokens_short_rows(const FewTokens& work, const float* x, int64_t first, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = kVecs * Vec::kWidth;
  Vec values[kCount][kVecs];
  for (int t = 0; t < kCount; ++t)
    for (int i = 0; i < kVecs; ++i) values[t][i] = Vec::load(x + t * kColumns + i * Vec::kWidth);
  const int64_t ahead = prefetch_distance(kColumns * static_cast<int64_t>(sizeof(float)));
  const float* row = static_cast<const float*>(work.w) + begin * kColumns;
  for (int64_t n = begin; n < end; ++n, row += kColumns) {
    prefetch(row, kColumns, ahead);
#pragma GCC unroll 8
    for (int t = 0; t < kCount; ++t) {
      Vec sum = Vec::zero();
#pragma GCC unroll 3
      for (int i = 0; i < kVecs; ++i) sum = Vec::fma(Vec::load(row + i * Vec::kWidth), values[t][i], sum);
      float& y = work.y[(first + t) * work.rows + n];
      y = work.accumulate ? y + sum.sum() : sum.sum();
    }
  }
}

void few_tokens(const FewTokens& work, int64_t begin, int64_t end) {
  const int64_t vecs = work.columns % Vec::kWidth == 0 ? work.columns / Vec::kWidth : 0;
  if (work.dtype == DType::kF32 && vecs >= 1 && vecs <= 3) {
    for_token_groups(work.tokens, [&](auto count, int64_t first) {
      constexpr int kCount = decltype(count)::kCount;
      const float* x = work.x + first * work.columns;
      if (vecs == 1) return few_tokens_short_rows<kCount, 1>(work, x, first, begin, end);
      if (vecs == 2) return few_tokens_short_rows<kCount, 2>(work, x, first, begin, end);
      few_tokens_short_rows<kCount, 3>(work, x, first, begin, end);
    });
    return;
  }
  with_dtype(work.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_token_groups(work.tokens, [&](auto count, int64_t first) {
      constexpr int kCount = decltype(count)::kCount;
      const float* x = work.x + first * work.columns;
      const int64_t whole = work.columns / Vec::kWidth * Vec::kWidth;
      alignas(64) Tails<kCount> tails = {};
      for (int t = 0; t < kCount; ++t)
        for (int64_t j = whole; j < work.columns; ++j) tails[t][j - whole] = x[t * work.columns + j];
      for (int64_t n = begin; n < end; ++n) {
        float sums[kCount];
        few_tokens_row<T, kCount>(work, static_cast<const T*>(work.w) + n * work.columns, x, tails, sums);
        for (int t = 0; t < kCount; ++t) {
          float& y = work.y[(first + t) * work.rows + n];
          y = work.accumulate ? y + sums[t] : sums[t];
        }
      }
    });
  });
}

}  // namespace
}  // namespace peft_ext
