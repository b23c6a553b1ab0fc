// The rank's own products, S = x̃ Aᵀ and dA = Pᵀ x̃, on the tiles. Included after the target pragma and the microkernel's
// file.
#pragma once

#include "linear/cpu/tiles/block.h"
#include "linear/cpu/tiles/decode.h"

namespace peft_ext {
namespace {

void shrink(const TileShrink& work, int64_t begin, int64_t end, bf16* panel) {
  const TileUnit unit;
  const int64_t tiles = tiles_of(work.m.columns), length = tiles * kTile, ranks = work.rank_strips * kStrip;
  weight_rows(work.m, begin, end, panel);
  const __m512 scale = _mm512_set1_ps(work.scale);
  Block block;
  for (int64_t row = begin; row < end; row += kBlockStrips * kStrip) {
    block.left = static_cast<int>(min_i64(kBlockStrips, ceil_div(end - row, kStrip)));
    const bf16* rows = panel + (row - begin) / kStrip * length;
    for (int64_t strip = 0; strip < work.rank_strips; ++strip) {
      block.clear();
      for (int term = 0; term < work.terms; term += kBlockStrips)
        multiply(rows, block.left, work.a + (strip * work.terms + term) * length,
                 static_cast<int>(min_i64(kBlockStrips, work.terms - term)), tiles, block.c);
      for (int64_t i = 0; i < min_i64(end - row, kBlockStrips * kStrip); ++i) {
        const int part = static_cast<int>(i / kStrip);
        const __m512 sums = _mm512_add_ps(_mm512_load_ps(block.part(part, 0) + i % kStrip * kStrip),
                                          _mm512_load_ps(block.part(part, 1) + i % kStrip * kStrip));
        _mm512_storeu_ps(work.out + (row + i) * ranks + strip * kStrip, _mm512_mul_ps(sums, scale));
      }
    }
    if (work.squares == nullptr) continue;
    for (int64_t i = 0; i < min_i64(end - row, kBlockStrips * kStrip); ++i) {
      const bf16* values = rows + i / kStrip * length + i % kStrip * kTileDepth;
      __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
      for (int64_t d = 0; d < tiles; ++d) {
        const __m512i pair = _mm512_load_si512(values + d * kTile);
        const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
        const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(-65536)));
        even = _mm512_fmadd_ps(low, low, even);
        odd = _mm512_fmadd_ps(high, high, odd);
      }
      work.squares[row + i] = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
    }
  }
}

void outer(const TileOuter& work, int64_t begin, int64_t end, bf16* panel) {
  const TileUnit unit;
  const int64_t tiles = tiles_of(work.m.rows), length = tiles * kTile, ranks = work.rank_strips * kStrip;
  weight_lanes(work.m, begin, end, panel);
  Block block;
  for (int64_t column = begin; column < end; column += kBlockStrips * kStrip) {
    block.right = static_cast<int>(min_i64(kBlockStrips, ceil_div(end - column, kStrip)));
    for (int64_t strip = 0; strip < work.rank_strips; ++strip) {
      block.clear();
      for (int term = 0; term < work.terms; term += kBlockStrips)
        multiply(work.left + (strip * work.terms + term) * length,
                 static_cast<int>(min_i64(kBlockStrips, work.terms - term)), panel + (column - begin) / kStrip * length,
                 block.right, tiles, block.c);
      for (int64_t j = 0; j < min_i64(end - column, kBlockStrips * kStrip); ++j) {
        const float* one = block.part(0, static_cast<int>(j / kStrip)) + j % kStrip;
        const float* two = block.part(1, static_cast<int>(j / kStrip)) + j % kStrip;
        for (int64_t r = 0; r < kStrip; ++r)
          work.out[(column + j) * ranks + strip * kStrip + r] = work.scale * (one[r * kStrip] + two[r * kStrip]);
      }
    }
  }
}

}  // namespace
}  // namespace peft_ext
