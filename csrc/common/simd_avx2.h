// AVX2 loads and stores of 8 values of any element type, in float32. Include after target_avx2.h.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "common/dtype.h"

namespace peft_ext {
namespace {

inline __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
inline __m256 load8(const bf16* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 load8(const f16* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }

inline __m128i round_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  return _mm256_castsi256_si128(words);
}
inline __m128i round_f16(__m256 value) { return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }

inline void store8(float* out, __m256 value) { _mm256_storeu_ps(out, value); }
inline void store8(bf16* out, __m256 value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out), round_bf16(value)); }
inline void store8(f16* out, __m256 value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out), round_f16(value)); }

}  // namespace
}  // namespace peft_ext
