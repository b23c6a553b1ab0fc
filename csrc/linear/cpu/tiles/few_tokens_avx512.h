// TileFewTokens: multiplies few tokens with the rows of a dense W in row-major order, by the dot product of
// AVX512-BF16. Include this file after the target pragma (cpu/target_<isa>.h).
#pragma once

#include "cpu/prefetch.h"
#include "cpu/simd_avx512.h"
#include "linear/cpu/tiles/panels.h"

namespace peft_ext {
namespace {

void few_tokens_pack(const float* x, int64_t tokens, int64_t columns, bf16* out) {
  if (tokens > kFewestTokens) {
    few_tokens_pack(x, kFewestTokens, columns, out);
    few_tokens_pack(x + kFewestTokens * columns, tokens - kFewestTokens, columns,
                    out + kFewestTokens * tiles_of(columns) * kTileDepth);
    return;
  }
  for (int64_t j = 0; j < columns; j += kTileDepth)
    for (int64_t t = 0; t < tokens; ++t) {
      const __mmask32 inside = first_bits(columns - j);
      const float* from = x + t * columns + j;
      const __m256i low = round_bf16(_mm512_maskz_loadu_ps(static_cast<__mmask16>(inside), from));
      const __m256i high = round_bf16(_mm512_maskz_loadu_ps(static_cast<__mmask16>(inside >> 16), from + 16));
      _mm512_storeu_si512(out + (j * tokens + t * kTileDepth),
                          _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
}

// Multiplies kRows rows of W at a time, so that each value of x is loaded once for all kRows rows. For one token kRows
// is 1, because memory is read faster in order than in several rows at a time. few_tokens_pack has stored the values of
// all tokens for 32 columns side by side, and x is read from L1 or L2. The result for a row of W does not depend on how
// many rows are multiplied at a time.
template <int kTokens, int kRows>
inline void few_tokens_block(const TileFewTokens& work, int64_t row) {
  // Each addition to a sum must wait for the previous addition to this sum. Several independent sums keep the
  // multiplier busy.
  constexpr int kSums = kTokens == 1 ? 4 : kTokens <= 3 ? 2 : 1;
  const int64_t k = work.columns;
  const int64_t ahead = prefetch_distance(kRows * k * static_cast<int64_t>(sizeof(bf16)));
  __m512 sums[kRows][kTokens][kSums];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
      for (int s = 0; s < kSums; ++s) sums[r][t][s] = _mm512_setzero_ps();
  const auto step = [&](int64_t j, int s, __mmask32 inside) {
    __m512bh w[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      _mm_prefetch(reinterpret_cast<const char*>(work.w + (row + r) * k + j) + ahead, _MM_HINT_T1);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      w[r] = reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(inside, work.w + (row + r) * k + j));
    const bf16* packed = work.x + j * kTokens;
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const auto x = reinterpret_cast<__m512bh>(_mm512_loadu_si512(packed + t * kTileDepth));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r][t][s] = _mm512_dpbf16_ps(sums[r][t][s], x, w[r]);
    }
  };
  int64_t j = 0;
  for (; j + kTileDepth * kSums <= k; j += kTileDepth * kSums)
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) step(j + kTileDepth * s, s, 0xffffffffu);
  for (; j < k; j += kTileDepth) step(j, 0, first_bits(k - j));
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      __m512 total = sums[r][t][0];
#pragma GCC unroll 4
      for (int s = 1; s < kSums; ++s) total = _mm512_add_ps(total, sums[r][t][s]);
      work.y[t * work.rows + row + r] = _mm512_reduce_add_ps(total);
    }
}

template <int kTokens>
inline void few_tokens_of(const TileFewTokens& work, int64_t begin, int64_t end) {
  constexpr int kRows = kTokens == 1 ? 1 : kTokens <= 6 ? 4 : 3;
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) few_tokens_block<kTokens, kRows>(work, row);
  for (; row < end; ++row) few_tokens_block<kTokens, 1>(work, row);
}

// Multiplies the rows [begin, end) of W with one group of at most 8 tokens.
inline void few_tokens_group(const TileFewTokens& work, int64_t begin, int64_t end) {
  switch (work.tokens) {
    case 1:
      return few_tokens_of<1>(work, begin, end);
    case 2:
      return few_tokens_of<2>(work, begin, end);
    case 3:
      return few_tokens_of<3>(work, begin, end);
    case 4:
      return few_tokens_of<4>(work, begin, end);
    case 5:
      return few_tokens_of<5>(work, begin, end);
    case 6:
      return few_tokens_of<6>(work, begin, end);
    case 7:
      return few_tokens_of<7>(work, begin, end);
    default:
      return few_tokens_of<8>(work, begin, end);
  }
}

void few_tokens(const TileFewTokens& work, int64_t begin, int64_t end) {
  if (work.tokens <= kFewestTokens) return few_tokens_group(work, begin, end);
  // kRows rows of W are multiplied with all groups of tokens before the next rows are read, so that the rows stay in
  // L2, and W is read from memory only once.
  constexpr int64_t kRows = 12;  // a multiple of every kRows with which few_tokens_of is compiled
  const int64_t length = tiles_of(work.columns) * kTileDepth;
  for (int64_t row = begin; row < end; row += kRows)
    for (int64_t t = 0; t < work.tokens; t += kFewestTokens) {
      TileFewTokens group = work;
      group.tokens = min_i64(kFewestTokens, work.tokens - t);
      group.x += t * length;
      group.y += t * work.rows;
      few_tokens_group(group, row, min_i64(row + kRows, end));
    }
}

}  // namespace
}  // namespace peft_ext
