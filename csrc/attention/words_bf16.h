// Words of bfloat16 operands for the products of AVX512-BF16 and AMX: a word holds two values (see
// attention/kernels.h). Include this file after the target pragma (cpu/target_<isa>.h) and Vec (cpu/simd_<isa>.h).
#pragma once

#include <immintrin.h>
#include <string.h>

#include "cpu/row_loop.h"
#include "cpu/vec_math.h"

namespace peft_ext {
namespace {

using Element = bf16;
constexpr int64_t kWord = 2;  // number of bfloat16 values in a 32-bit word

using WordVec = __m512bh;
inline WordVec load_words(const bf16* right) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(right)); }
inline WordVec broadcast_word(const bf16* left) {
  int32_t two;
  memcpy(&two, left, sizeof(two));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
}
PEFT_EXT_INLINE Vec add_products(WordVec a, WordVec b, Vec sum) { return {_mm512_dpbf16_ps(sum.v, a, b)}; }

inline __m512i low_halves(__m256i words) { return _mm512_cvtepu16_epi32(words); }

// Interleaves two rows that are adjacent in depth into one row of words of a right operand, in whole vectors. If
// `second` is null, the values of the second row are 0.
inline void join_rows(const bf16* first, const bf16* second, int64_t columns, bf16* right) {
  for (int64_t i = 0; i < columns; i += 16) {
    const __mmask16 inside = columns - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (columns - i)) - 1);
    const __m512i low = low_halves(_mm256_maskz_loadu_epi16(inside, first + i));
    const __m512i high = second ? low_halves(_mm256_maskz_loadu_epi16(inside, second + i)) : _mm512_setzero_si512();
    _mm512_storeu_si512(right + 2 * i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

// Rounds float32 values to bfloat16. Subnormal values become zero, which is accurate enough for P and dS.
inline __m256i narrow_bf16(Vec value) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value.v)); }

inline void store_left(Vec value, bf16* left) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(left), narrow_bf16(value));
}
// Stores a vector of words of a right operand: values[0] in the low halves and values[1] in the high halves, rounded as
// by narrow_bf16.
inline void store_right(const Vec* values, bf16* right) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(values[1].v, values[0].v));
  _mm512_storeu_si512(right, _mm512_permutexvar_epi16(order, both));
}

}  // namespace
}  // namespace peft_ext
