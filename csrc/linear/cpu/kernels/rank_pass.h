// RowPass: the rank pass, S = x̃ Aᵀ and dA = Pᵀ x̃, and x̃ alone. Include this file after the target pragma.
//
// kTokens rows by kPanel columns of m are widened to float32 in L1, where dropout is applied. Each value is then
// multiplied with a row of `right`, whose sums stay in registers over the panel, and with a row of `left`, whose sums
// are kept in `acc`.
// The outer loop runs over panels: a panel's rows of `right` and `acc`, 2 x kPanel x rank x 4 bytes, stay in L2 for all
// tokens. row_pass reads m once, in m's own dtype, and neither reads nor writes another matrix of m's size.
#pragma once

#include "linear/cpu/kernels/row_block.h"

namespace peft_ext {
namespace {

// Returns the sum of `count` products, added in vectors first, and then over the lanes of a vector.
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

// Loads the rows [t, t + tokens) and the columns [k, k + width) of m, widens the values to float32, and applies
// dropout.
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

void drop_elements(const DropElements& work, int64_t begin, int64_t end) {
  alignas(64) uint16_t buffer[draws_room(kDropTogether)];
  alignas(64) float values[kDropTogether];
  with_dtype(work.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = begin; i < end; i += kDropTogether) {
      const int64_t count = min_i64(kDropTogether, end - i);
      const uint16_t* draws = philox_draws(work.dropout, i, count, buffer);
      widen(static_cast<const T*>(work.m) + i, count, values);
      apply_dropout(work.dropout, draws, count, values);
      narrow(values, count, static_cast<T*>(work.out) + i);
    }
  });
}

template <int kRows>
inline void add_totals(const RowBlock& block, int64_t width, float* totals) {
  int64_t j = 0;
  for (; j + Vec::kWidth <= width; j += Vec::kWidth) {
    Vec sum = Vec::load(totals + j);
    for (int i = 0; i < kRows; ++i) sum = Vec::add(sum, Vec::load(block.values[i] + j));
    sum.store(totals + j);
  }
  for (; j < width; ++j)
    for (int i = 0; i < kRows; ++i) totals[j] += block.values[i][j];
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
void row_pass_range(const RowPass& pass, int64_t begin, int64_t end, int64_t first, int64_t last) {
  RowBlock block;
  for (int64_t k = first; k < last; k += kPanel) {
    const int64_t width = min_i64(kPanel, last - k);
    for_token_groups(end - begin, [&](auto group, int64_t at) {
      constexpr int kRows = decltype(group)::kCount;
      const int64_t t = begin + at;
      load_block<T>(pass, t, kRows, k, width, &block);
      row_block<kShrink, kOuter, kRows>(pass, block, t, k, width);
      if (kOuter && pass.totals != nullptr) add_totals<kRows>(block, width, pass.totals + k);
    });
  }
}

void row_pass(const RowPass& pass, int64_t begin, int64_t end, int64_t first, int64_t last) {
  with_dtype(pass.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (pass.left == nullptr) return row_pass_range<T, true, false>(pass, begin, end, first, last);
    if (pass.right == nullptr) return row_pass_range<T, false, true>(pass, begin, end, first, last);
    row_pass_range<T, true, true>(pass, begin, end, first, last);
  });
}

}  // namespace
}  // namespace peft_ext
