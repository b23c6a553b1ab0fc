// The low-rank kernels, written once over Vec (common/simd_<isa>.h). Included after the target pragma.
//
// row_pass: kTokens rows by kPanel columns are widened to float32 (and dropped) in L1; each value is then broadcast
// against a row of `right` (sum kept in registers over the panel) and against a row of `left` (sum kept in `acc`).
// The panel is the outer loop: its rows of `right` and `acc`, 2 x kPanel x rank x 4 bytes, stay in L2 over all tokens.
// m is read once, in its own dtype; nothing of its size is written.
//
// expand: kTokens rows by kVecs vectors of sums in registers, over the rank; `right` streams from L2 once for kTokens
// rows. y is written once.
#pragma once

#include "common/philox_impl.h"
#include "common/token_groups.h"
#include "lora/lora_kernels.h"

namespace peft_ext {
namespace {

constexpr int kTokens = 8;
constexpr int kPanel = 512;

// The sum of products over `count` values, in vectors and then over their lanes.
inline float dot(const float* a, const float* b, int64_t count) {
  Vec sum = Vec::zero();
  int64_t i = 0;
  for (; i + Vec::kWidth <= count; i += Vec::kWidth) sum = Vec::fma(Vec::load(a + i), Vec::load(b + i), sum);
  float lanes[Vec::kWidth];
  sum.store(lanes);
  float total = 0.0f;
  for (int lane = 0; lane < Vec::kWidth; ++lane) total += lanes[lane];
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

struct RowBlock {
  alignas(64) float values[kTokens][kPanel];
  alignas(64) uint16_t draws[draws_room(kPanel)];
};

// Rows [t, t + tokens), columns [k, k + width) of m, widened and dropped.
template <typename T>
inline void load_block(const RowPass& pass, int64_t t, int tokens, int64_t k, int64_t width, RowBlock* block) {
  for (int i = 0; i < tokens; ++i) {
    const int64_t flat = (t + i) * pass.columns + k;
    widen(static_cast<const T*>(pass.m) + flat, width, block->values[i]);
    if (pass.dropout.active) {
      const uint16_t* draws = philox_draws(pass.dropout, flat, width, block->draws);
      apply_dropout(pass.dropout, draws, width, block->values[i]);
      if (pass.keep != nullptr) keep_bits(pass.dropout, draws, width, pass.keep + (t + i) * pass.keep_words + k / 32);
    }
    if (pass.squares != nullptr) {
      const float sum = dot(block->values[i], block->values[i], width);
      pass.squares[t + i] = k == 0 ? sum : pass.squares[t + i] + sum;
    }
  }
}

void keep_mask(const KeepMask& mask, int64_t begin, int64_t end) {
  alignas(64) uint16_t buffer[draws_room(kPanel)];
  for (int64_t t = begin; t < end; ++t)
    for (int64_t k = 0; k < mask.columns; k += kPanel) {
      const int64_t width = min_i64(kPanel, mask.columns - k);
      const uint16_t* draws = philox_draws(mask.dropout, t * mask.columns + k, width, buffer);
      keep_bits(mask.dropout, draws, width, mask.keep + t * mask.words + k / 32);
    }
}

template <bool kShrink, bool kOuter, int kRows>
inline void row_block(const RowPass& pass, const RowBlock& block, int64_t t, int64_t k, int64_t width) {
  for (int64_t r = 0; r < pass.rank; r += Vec::kWidth) {
    Vec sum[kRows], left[kRows];
    for (int i = 0; i < kRows; ++i) {
      if (kShrink) sum[i] = k == 0 ? Vec::zero() : Vec::load(pass.out + (t + i) * pass.rank + r);
      if (kOuter) left[i] = Vec::load(pass.left + (t + i) * pass.rank + r);
    }
    const float* right = kShrink ? pass.right + k * pass.rank + r : nullptr;
    float* acc = kOuter ? pass.acc + k * pass.rank + r : nullptr;
    for (int64_t j = 0; j < width; ++j) {
      Vec weight = Vec::zero(), total = Vec::zero();
      if (kShrink) weight = Vec::load(right + j * pass.rank);
      if (kOuter) total = Vec::load(acc + j * pass.rank);
      for (int i = 0; i < kRows; ++i) {
        const Vec value = Vec::broadcast(block.values[i][j]);
        if (kShrink) sum[i] = Vec::fma(value, weight, sum[i]);
        if (kOuter) total = Vec::fma(value, left[i], total);
      }
      if (kOuter) total.store(acc + j * pass.rank);
    }
    if (kShrink)
      for (int i = 0; i < kRows; ++i) sum[i].store(pass.out + (t + i) * pass.rank + r);
  }
}

template <typename T, bool kShrink, bool kOuter>
void row_pass_range(const RowPass& pass, int64_t begin, int64_t end) {
  RowBlock block;
  for (int64_t k = 0; k < pass.columns; k += kPanel) {
    const int64_t width = min_i64(kPanel, pass.columns - k);
    int64_t t = begin;
    for (; t + kTokens <= end; t += kTokens) {
      load_block<T>(pass, t, kTokens, k, width, &block);
      row_block<kShrink, kOuter, kTokens>(pass, block, t, k, width);
    }
    for (; t < end; ++t) {
      load_block<T>(pass, t, 1, k, width, &block);
      row_block<kShrink, kOuter, 1>(pass, block, t, k, width);
    }
  }
}

void row_pass(const RowPass& pass, int64_t begin, int64_t end) {
  with_dtype(pass.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (pass.left == nullptr) return row_pass_range<T, true, false>(pass, begin, end);
    if (pass.right == nullptr) return row_pass_range<T, false, true>(pass, begin, end);
    row_pass_range<T, true, true>(pass, begin, end);
  });
}

// sums = bias_before + left right
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

template <typename T>
void expand_range(const Expand& expand, int64_t begin, int64_t end) {
  RowBlock block;
  alignas(64) float residual[kPanel];
  for (int64_t t = begin; t < end;) {
    const int rows = end - t >= kTokens ? kTokens : 1;
    for (int64_t n = 0; n < expand.columns; n += kPanel) {
      const int64_t width = min_i64(kPanel, expand.columns - n);
      if (rows == kTokens)
        expand_block<kTokens>(expand, t, n, width, block.values);
      else
        expand_block<1>(expand, t, n, width, block.values);
      for (int i = 0; i < rows; ++i) {
        float* values = block.values[i];
        const int64_t flat = (t + i) * expand.columns + n;
        if (expand.before != nullptr)
          for (int64_t j = 0; j < width; ++j) values[j] += expand.before[flat + j];
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
    t += rows;
  }
}

void expand(const Expand& work, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto zero) { expand_range<decltype(zero)>(work, begin, end); });
}

// The values of tokens behind the last whole vector of a row, and zeros.
template <int kCount>
using Tails = float[kCount][Vec::kWidth];

// Values in float32: where they lie, or in a buffer.
inline const float* widened(const float* x, int64_t, float*) { return x; }
template <typename T>
inline const float* widened(const T* x, int64_t count, float* buffer) {
  widen(x, count, buffer);
  return buffer;
}

// A row's sums with each token. Short rows (B's have the rank's length) are all reduction: no sum that no vector was
// added to takes part in it.
template <typename T, int kCount>
inline void few_tokens_row(const FewTokens& work, const T* row, const float* x, const Tails<kCount>& tails,
                           float* sums) {
  // One token's sum would wait for the product before it.
  constexpr int kSums = kCount >= 4 ? 1 : 4;
  constexpr int kStep = kSums * Vec::kWidth;
  static_assert(kPanel % kStep == 0, "the tail is the last panel's");
  alignas(64) float buffer[kPanel];
  Vec sum[kCount][kSums];
#pragma GCC unroll 8
  for (int t = 0; t < kCount; ++t)
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) sum[t][i] = Vec::zero();
  for (int64_t k = 0; k < work.columns; k += kPanel) {
    const int64_t width = min_i64(kPanel, work.columns - k);
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

void few_tokens(const FewTokens& work, int64_t begin, int64_t end) {
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

void column_pass(const ColumnPass& pass, int64_t begin, int64_t end) {
  with_dtype(pass.dtype, [&](auto zero) {
    with_dtype(pass.other_dtype, [&](auto other) { column_range<decltype(zero), decltype(other)>(pass, begin, end); });
  });
}

}  // namespace
}  // namespace peft_ext
