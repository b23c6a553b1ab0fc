// Defines multiply() of the tile kernels with the dot product of AVX512-BF16. block.h describes what multiply() must
// compute. Include this file after the target pragma (cpu/target_<isa>.h).
//
// The sums of 8 rows by 2 strips of lanes are in 16 registers. For each pair of elements of the depth, the kernel loads
// two registers of lanes, and broadcasts one pair of elements from each of eight rows. Because 16 products need only
// these 10 loads, the products limit the speed, at one product per cycle. A single strip of tokens is multiplied with
// 16 rows of an NF4 weight that aligned_blocks accepts, without making a panel: 64 columns are decoded into L1, one row
// after every 32 products with the previous 64 columns. Decoding uses the shuffle and store units, which the products
// leave idle. (For a dense W, copying row after row into a panel is faster than such a product without a panel.)
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "linear/cpu/tiles/decode_avx512.h"

namespace peft_ext {
namespace {

struct TileUnit {
  TileUnit() {}
};

constexpr int kRowsTogether = 8;
constexpr int64_t kRowsOfStep = kRowsTogether;  // number of rows of a block that multiply_rows multiplies at a time
constexpr int64_t kDecodeStrips = 1;
inline Strips rows_of(const bf16* matrix, int64_t) { return Strips{matrix, 0}; }
constexpr int64_t kFewStrips = 0;

// A left operand of multiply(): the rows of W from `row` on, which multiply() decodes during the product with one strip
// of tokens.
struct DecodedRows {
  const TileWeight* weight;
  int64_t row;
};
inline bool decodes_rows(const TileWeight& w) { return aligned_blocks(w); }
inline DecodedRows decoded_rows(const TileWeight& weight, int64_t row) { return DecodedRows{&weight, row}; }

// Decodes the columns [column, column + 64) of a row, or writes zeros if the row is beyond the last row. decode_row
// also prefetches memory of the row from 256 columns further on, or, beyond the end of the row, memory of the first
// columns of the row that is 16 rows further on.
inline void decode_row(const TileWeight& w, int64_t row, int64_t column, bf16* out) {
  const int64_t far = column + 4 * kPanelStep;
  __builtin_prefetch(
      element_address(w, far < w.columns ? row * w.columns + far : (row + kStrip) * w.columns + far - w.columns), 0, 3);
  __m512i values[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  if (row < w.rows) decode64(w, true, row, column, kPanelStep, values);
  _mm512_store_si512(out, values[0]);
  _mm512_store_si512(out + 32, values[1]);
}

inline void multiply_decoded(const TileWeight& w, int64_t row, const bf16* right, int64_t tiles, float* c) {
  alignas(64) bf16 held[2][kStrip * kPanelStep];
  __m512 sums[kStrip];
  for (int r = 0; r < kStrip; ++r) sums[r] = _mm512_load_ps(c + r * kStrip);
  for (int r = 0; r < kStrip; ++r) decode_row(w, row + r, 0, held[0] + r * kPanelStep);
  for (int64_t d = 0; d < tiles; d += 2) {  // `tiles` is even, because the number of W's columns is a multiple of 64
    const bf16* rows = held[d / 2 % 2];
    bf16* next = held[(d / 2 + 1) % 2];
    const bf16* lanes = right + d * kTile;
    for (int decoded = 0; decoded < kStrip; ++decoded) {
      if (d + 2 < tiles) decode_row(w, row + decoded, (d + 2) * kTileDepth, next + decoded * kPanelStep);
      for (int pair = 2 * decoded; pair < 2 * decoded + 2; ++pair) {
        const __m512i lane = _mm512_load_si512(lanes + pair * 2 * kStrip);
        for (int r = 0; r < kStrip; ++r) {
          int32_t two;
          __builtin_memcpy(&two, rows + r * kPanelStep + 2 * pair, sizeof(two));
          sums[r] = _mm512_dpbf16_ps(sums[r], reinterpret_cast<__m512bh>(_mm512_set1_epi32(two)),
                                     reinterpret_cast<__m512bh>(lane));
        }
      }
    }
  }
  for (int r = 0; r < kStrip; ++r) _mm512_store_ps(c + r * kStrip, sums[r]);
}

inline void multiply(const DecodedRows& left, int left_strips, const Strips& right, int, int64_t tiles, float* c,
                     Ahead*) {
  for (int i = 0; i < left_strips; ++i)
    multiply_decoded(*left.weight, left.row + i * kStrip, right.at, tiles, c + i * 2 * kStrip * kStrip);
}

template <int kRight>
inline void multiply_rows(const bf16* left, const Strips& right, int64_t tiles, float* c, Ahead* ahead) {
  __m512 sums[kRowsTogether][kRight];
  for (int r = 0; r < kRowsTogether; ++r)
    for (int j = 0; j < kRight; ++j) sums[r][j] = _mm512_load_ps(c + j * kStrip * kStrip + r * kStrip);
  for (int64_t d = 0; d < tiles; ++d) {
    ahead->fetch();
    const bf16* rows = left + d * kTile;
    const bf16* lanes = right.at + d * kTile;
#pragma GCC unroll 2
    for (int pair = 0; pair < kTileDepth / 2; ++pair) {
      __m512i lane[kRight];
      for (int j = 0; j < kRight; ++j) lane[j] = _mm512_load_si512(lanes + j * right.stride + pair * 2 * kStrip);
      for (int r = 0; r < kRowsTogether; ++r) {
        int32_t two;
        __builtin_memcpy(&two, rows + r * kTileDepth + 2 * pair, sizeof(two));
        const __m512bh row = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
        for (int j = 0; j < kRight; ++j)
          sums[r][j] = _mm512_dpbf16_ps(sums[r][j], row, reinterpret_cast<__m512bh>(lane[j]));
      }
    }
  }
  for (int r = 0; r < kRowsTogether; ++r)
    for (int j = 0; j < kRight; ++j) _mm512_store_ps(c + j * kStrip * kStrip + r * kStrip, sums[r][j]);
}

inline void multiply(const Strips& left, int left_strips, const Strips& right, int right_strips, int64_t tiles,
                     float* c, Ahead* ahead) {
  for (int i = 0; i < left_strips; ++i)
    for (int64_t half = 0; half < kStrip; half += kRowsTogether) {
      const bf16* rows = left.at + i * left.stride + half * kTileDepth;
      float* sums = c + i * 2 * kStrip * kStrip + half * kStrip;
      if (right_strips == 2)
        multiply_rows<2>(rows, right, tiles, sums, ahead);
      else
        multiply_rows<1>(rows, right, tiles, sums, ahead);
    }
}

}  // namespace
}  // namespace peft_ext
