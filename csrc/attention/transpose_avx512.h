// Transposes a matrix of 32-bit words with AVX-512. Include this file after the target pragma (cpu/target_<isa>.h).
#pragma once

#include "linear/cpu/tiles/transpose_avx512.h"

namespace peft_ext {
namespace {

// Computes y[c * y_stride + r] = x[r, c] for 32-bit words. x_bytes: distance between rows of x in bytes. y_stride:
// distance between rows of y in words.
inline void transpose_words(const void* x, int64_t x_bytes, int64_t rows, int64_t columns, void* y, int64_t y_stride) {
  constexpr int64_t kSide = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += kSide)
    for (int64_t c0 = 0; c0 < columns; c0 += kSide) {
      const int64_t high = min_i64(kSide, rows - r0), wide = min_i64(kSide, columns - c0);
      const __mmask16 of_x = static_cast<__mmask16>((1u << wide) - 1), of_y = static_cast<__mmask16>((1u << high) - 1);
      __m512i words[kSide];
      for (int64_t i = 0; i < kSide; ++i)
        words[i] = i < high ? _mm512_maskz_loadu_epi32(of_x, static_cast<const char*>(x) + (r0 + i) * x_bytes + 4 * c0)
                            : _mm512_setzero_si512();
      transpose16(words);
      for (int64_t i = 0; i < wide; ++i)
        _mm512_mask_storeu_epi32(static_cast<char*>(y) + 4 * ((c0 + i) * y_stride + r0), of_y, words[i]);
    }
}

}  // namespace
}  // namespace peft_ext
