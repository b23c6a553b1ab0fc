// A block of up to 2 x 2 strips of sums, which stays in L1: cleared, added to, and written once. Included after the
// target pragma and after the microkernel's file, which has
//   multiply(left, left_strips, right, right_strips, tiles, c, ahead), kRowsOfStep, kDecodeStrips:
//     c[i][j] += left strip i times right strip j, for up to 2 x 2 strips; c[i][j] is [16][16] float32, 1 KiB
//     and a step of `ahead` for each kRowsOfStep rows of it and each tile of the depth, or none
//   rows_of(matrix, columns), kFewStrips: rows of a row-major matrix as such a left operand, whole tiles of it, which
//     up to so many strips of tokens are multiplied with; none: always a copy in strips
//   class TileUnit: an object lives while a task multiplies.
#pragma once

#include "cpu/simd_avx512.h"
#include "linear/cpu/tiles/tiles.h"
#include "linear/cpu/tiles/transpose.h"

namespace peft_ext {
namespace {

constexpr int kBlockStrips = 2;  // strips of a block, either way
constexpr int kBlockElements = kBlockStrips * kBlockStrips * kStrip * kStrip;

template <typename Left>
inline void multiply(const Left& left, int left_strips, const bf16* right, int right_strips, int64_t tiles, float* c) {
  Ahead nothing;
  multiply(left, left_strips, right, right_strips, tiles, c, &nothing);
}

struct Block {
  alignas(64) float c[kBlockElements];
  int left, right;  // strips

  float* part(int i, int j) { return c + (i * kBlockStrips + j) * kStrip * kStrip; }
  void clear() {
    for (int i = 0; i < kBlockElements; i += 16) _mm512_store_ps(c + i, _mm512_setzero_ps());
  }
  // f(row's vector, row of the block, right strip) -> vector, for every row of every part.
  template <typename F>
  void each(const F& f) {
    for (int i = 0; i < left; ++i)
      for (int j = 0; j < right; ++j)
        for (int r = 0; r < kStrip; ++r) {
          float* row = part(i, j) + r * kStrip;
          _mm512_store_ps(row, f(_mm512_load_ps(row), i * kStrip + r, j));
        }
  }
};

// Column j of the block's parts: c += left [rows, rank] right [rank, 16], in float32: the low-rank term of `lanes`.
inline void add_low_rank(const float* left, const float* right, int64_t rank, int j, Block* block,
                         __mmask16 lanes = 0xffff) {
  for (int i = 0; i < block->left; ++i) {
    float* c = block->part(i, j);
    __m512 sums[kStrip];
    for (int r = 0; r < kStrip; ++r) sums[r] = _mm512_load_ps(c + r * kStrip);
    const float* rows = left + i * kStrip * rank;
    for (int64_t q = 0; q < rank; ++q) {
      const __m512 lane = _mm512_loadu_ps(right + q * kStrip);
      for (int r = 0; r < kStrip; ++r)
        sums[r] = _mm512_mask3_fmadd_ps(_mm512_set1_ps(rows[r * rank + q]), lane, sums[r], lanes);
    }
    for (int r = 0; r < kStrip; ++r) _mm512_store_ps(c + r * kStrip, sums[r]);
  }
}

// The same of every column; right [strips, rank, 16].
inline void add_low_rank(const float* left, const float* right, int64_t rank, Block* block) {
  for (int j = 0; j < block->right; ++j) add_low_rank(left, right + j * rank * kStrip, rank, j, block);
}

// Two rows of 16 floats, one after the other, rounded; `count` of the 32 are stored.
inline void store_row(bf16* out, __m512 first, __m512 second, int64_t count) {
  const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(round_bf16(first)), round_bf16(second), 1);
  if (count >= 32)
    _mm512_storeu_si512(out, words);
  else
    _mm512_mask_storeu_epi16(out, (1u << count) - 1, words);
}

// The block, whose rows are columns of out and whose lanes are rows of out, transposed into out [tokens, columns];
// more: what is added, of each of the block's tokens kPanelStep values, or null.
inline void store_transposed(Block* block, bf16* out, int64_t token, int64_t tokens, int64_t column, int64_t columns,
                             const float* more = nullptr) {
  for (int j = 0; j < block->right; ++j) {
    __m512i rows[kBlockStrips][kStrip];
    for (int i = 0; i < kBlockStrips; ++i) {
      for (int r = 0; r < kStrip; ++r)
        rows[i][r] = i < block->left ? _mm512_load_si512(block->part(i, j) + r * kStrip) : _mm512_setzero_si512();
      if (i < block->left) transpose16(rows[i]);
    }
    const int64_t first = token + j * kStrip;
    for (int64_t t = 0; t < min_i64(kStrip, tokens - first); ++t) {
      __m512 low = _mm512_castsi512_ps(rows[0][t]), high = _mm512_castsi512_ps(rows[1][t]);
      if (more != nullptr) {
        const float* of_token = more + (j * kStrip + t) * kPanelStep;
        low = _mm512_add_ps(low, _mm512_load_ps(of_token));
        high = _mm512_add_ps(high, _mm512_load_ps(of_token + kStrip));
      }
      store_row(out + (first + t) * columns + column, low, high, min_i64(columns - column, 2 * kStrip));
    }
  }
}

}  // namespace
}  // namespace peft_ext
