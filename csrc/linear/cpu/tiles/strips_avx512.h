// Converts activations to strips, in AVX-512 with BF16, and applies the dropout mask and the scale at the same time.
// Include this file after the target pragma (cpu/target_<isa>.h).
#pragma once

#include "linear/cpu/tiles/panels.h"
#include "linear/cpu/tiles/transpose_avx512.h"

namespace peft_ext {
namespace {

// Returns the 32 columns from d on of a row of m, after the dropout mask and the scale, with zeros beyond the matrix.
inline __m512i token_values(const TokenStrips& work, int64_t row, int64_t d) {
  if (row >= work.tokens) return _mm512_setzero_si512();
  const int64_t left = work.depth - d;
  const __mmask32 inside = left >= 32 ? 0xffffffffu : (1u << left) - 1;
  __mmask32 mask = inside;
  if (work.keep != nullptr) mask &= work.keep[row * work.keep_words + d / 32];
  __m512i values = _mm512_maskz_loadu_epi16(mask, work.m + row * work.depth + d);
  if (work.scale == nullptr) return values;
  const auto half = [&](__m256i words, __mmask16 within, const float* scale) {
    const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    return round_bf16(_mm512_mul_ps(wide, _mm512_maskz_loadu_ps(within, scale)));
  };
  const __m256i low = half(_mm512_castsi512_si256(values), static_cast<__mmask16>(inside), work.scale + d);
  const __m256i high =
      half(_mm512_extracti64x4_epi64(values, 1), static_cast<__mmask16>(inside >> 16), work.scale + d + 16);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

void left_strips(const TokenStrips& work, int64_t begin, int64_t end) {
  const int64_t tiles = tiles_of(work.depth);
  for (int64_t strip = begin; strip < end; ++strip)
    for (int64_t i = 0; i < kStrip; ++i)
      for (int64_t d = 0; d < tiles; ++d)
        _mm512_store_si512(work.strips + (strip * tiles + d) * kTile + i * kTileDepth,
                           token_values(work, strip * kStrip + i, d * kTileDepth));
}

void right_strips(const TokenStrips& work, int64_t begin, int64_t end) {
  const int64_t tiles = tiles_of(work.depth);
  for (int64_t strip = begin; strip < end; ++strip)
    for (int64_t d = 0; d < tiles; ++d) {
      __m512i values[16];
      for (int64_t i = 0; i < kStrip; ++i) values[i] = token_values(work, strip * kStrip + i, d * kTileDepth);
      transpose16(values);
      for (int64_t i = 0; i < kStrip; ++i)
        _mm512_store_si512(work.strips + (strip * tiles + d) * kTile + i * 2 * kStrip, values[i]);
    }
}

}  // namespace
}  // namespace peft_ext
