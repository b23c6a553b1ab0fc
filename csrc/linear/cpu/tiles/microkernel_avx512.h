// multiply() of the tile kernels with AVX512-BF16's dot product. Its contract is in block.h. Included after the target
// pragma.
//
// 8 rows by 2 strips of lanes are 16 sums in registers: each pair of depth loads two registers of lanes and broadcasts
// eight pairs of rows, 10 loads for 16 products, so that the products bound it where one is issued per cycle.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "linear/cpu/tiles/tiles.h"

namespace peft_ext {
namespace {

struct TileUnit {
  TileUnit() {}
};

constexpr int kRowsTogether = 8;
constexpr int64_t kRowsOfStep = kRowsTogether;  // of the block, that one step of the depth multiplies
constexpr int64_t kDecodeStrips = 1;
inline const bf16* rows_of(const bf16* matrix, int64_t) { return matrix; }
constexpr int64_t kFewStrips = 0;

template <int kRight>
inline void multiply_rows(const bf16* left, const bf16* right, int64_t tiles, float* c, Ahead* ahead) {
  __m512 sums[kRowsTogether][kRight];
  for (int r = 0; r < kRowsTogether; ++r)
    for (int j = 0; j < kRight; ++j) sums[r][j] = _mm512_load_ps(c + j * kStrip * kStrip + r * kStrip);
  for (int64_t d = 0; d < tiles; ++d) {
    ahead->fetch();
    const bf16* rows = left + d * kTile;
    const bf16* lanes = right + d * kTile;
#pragma GCC unroll 2
    for (int pair = 0; pair < kTileDepth / 2; ++pair) {
      __m512i lane[kRight];
      for (int j = 0; j < kRight; ++j) lane[j] = _mm512_load_si512(lanes + j * tiles * kTile + pair * 2 * kStrip);
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

inline void multiply(const bf16* left, int left_strips, const bf16* right, int right_strips, int64_t tiles, float* c,
                     Ahead* ahead) {
  for (int i = 0; i < left_strips; ++i)
    for (int64_t half = 0; half < kStrip; half += kRowsTogether) {
      const bf16* rows = left + i * tiles * kTile + half * kTileDepth;
      float* sums = c + i * 2 * kStrip * kStrip + half * kStrip;
      if (right_strips == 2)
        multiply_rows<2>(rows, right, tiles, sums, ahead);
      else
        multiply_rows<1>(rows, right, tiles, sums, ahead);
    }
}

}  // namespace
}  // namespace peft_ext
