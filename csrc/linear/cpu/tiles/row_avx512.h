// Defines Row, 16 sums of a block in one register, for AVX-512 with BF16. See block.h. Include this file after the
// target pragma.
#pragma once

#include "cpu/simd_avx512.h"
#include "linear/cpu/tiles/transpose_avx512.h"

namespace peft_ext {
namespace {

using Row = Vec;
static_assert(Row::kWidth == 16);

constexpr int kLowRankRows = 16;

inline void transposed(const float* part, Row* rows) {
  __m512i words[16];
  for (int r = 0; r < 16; ++r) words[r] = _mm512_load_si512(part + r * 16);
  transpose16(words);
  for (int r = 0; r < 16; ++r) rows[r] = {_mm512_castsi512_ps(words[r])};
}

inline void store_row(bf16* out, Row first, Row second, int64_t count) {
  const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(round_bf16(first.v)), round_bf16(second.v), 1);
  if (count >= 32)
    _mm512_storeu_si512(out, words);
  else
    _mm512_mask_storeu_epi16(out, (1u << count) - 1, words);
}

}  // namespace
}  // namespace peft_ext
