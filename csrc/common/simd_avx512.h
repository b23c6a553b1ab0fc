// AVX-512 loads and stores of 16 values of any element type, in float32. Include after target_avx512.h.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "common/dtype.h"

namespace peft_ext {
namespace {

inline __m512 load16(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 load16(const bf16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 load16(const f16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

inline __m512 load16_masked(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
inline __m512 load16_masked(const bf16* x, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}
inline __m512 load16_masked(const f16* x, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x));
}

// Integer rounding, not vcvtneps2bf16: that one flushes subnormals to zero.
inline __m256i round_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(rounded);
}
inline __m256i round_f16(__m512 value) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }

inline void store16(float* out, __m512 value) { _mm512_storeu_ps(out, value); }
inline void store16(bf16* out, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), round_bf16(value));
}
inline void store16(f16* out, __m512 value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), round_f16(value)); }

inline void store16_masked(float* out, __m512 value, __mmask16 mask) { _mm512_mask_storeu_ps(out, mask, value); }
inline void store16_masked(bf16* out, __m512 value, __mmask16 mask) {
  _mm256_mask_storeu_epi16(out, mask, round_bf16(value));
}
inline void store16_masked(f16* out, __m512 value, __mmask16 mask) {
  _mm256_mask_storeu_epi16(out, mask, round_f16(value));
}

}  // namespace
}  // namespace peft_ext
