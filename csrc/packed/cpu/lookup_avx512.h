// Decodes codes with AVX-512: looks 32 codes of 4 bits up in tables of 16 values, and converts codes of FP8. Include
// this file after the target pragma.
#pragma once

#include "cpu/simd_avx512.h"
#include "weight/packed_view.h"

#define PEFT_EXT_LOOKUP 1  // format_kernels_impl.h calls lookup32 and e4m3_run if this macro is defined

namespace peft_ext {
namespace {

// Returns the indices of 32 codes in 32 words of 16 bits. In each word, the bits above the lowest four have no meaning.
template <Nibbles kNibbles>
inline __m512i word_indices(const uint8_t* codes) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  if (kNibbles == Nibbles::kHalves) {
    const __m256i low = _mm256_cvtepu8_epi16(bytes);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_srli_epi16(low, 4), 1);
  }
  const __m512i wide = _mm512_cvtepu8_epi32(bytes);
  return kNibbles == Nibbles::kLowFirst ? _mm512_or_si512(wide, _mm512_slli_epi32(wide, 12))
                                        : _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
}

// Returns 8 words of 32 bits for 8 values: the high half of a word is the value, rounded to bfloat16 as in round_bf16.
inline __m256i rounded_words(const float* values) {
  const __m256 value = _mm256_loadu_ps(values);
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  return _mm256_mask_mov_epi32(sum, _mm256_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm256_set1_epi32(0x7fc00000));
}

// Rounds 32 values to bfloat16. A format's decode32 writes the values as vectors of 8; a load of 16 values would wait
// until both vectors are in the cache.
inline void store_run(const float* run, bf16* out) {
  const __m256i high_words = _mm256_setr_epi16(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  for (int i = 0; i < 32; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm256_permutex2var_epi16(rounded_words(run + i), high_words, rounded_words(run + i + 8)));
}

// Returns 16 values, rounded to the type of the second argument.
inline __m256i round16(const float* values, bf16) { return round_bf16(_mm512_loadu_ps(values)); }
inline __m256i round16(const float* values, f16) { return round_f16(_mm512_loadu_ps(values)); }

// Returns the values of 16 e4m3 codes. A code without its sign is a magnitude. The values of the magnitudes below 8 are
// multiples of 2^-9; the bits of the other magnitudes, except the NaN 0x7f, are those of a float32, apart from the bias
// of the exponent.
inline __m512 e4m3_values(const uint8_t* codes) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512i magnitude = _mm512_and_si512(wide, _mm512_set1_epi32(0x7f));
  __m512 value = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23)));
  value = _mm512_mask_mul_ps(value, _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8)),
                             _mm512_cvtepi32_ps(magnitude), _mm512_set1_ps(0x1p-9f));
  value = _mm512_mask_mov_ps(value, _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f)),
                             _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
  const __m512i sign = _mm512_slli_epi32(_mm512_andnot_si512(_mm512_set1_epi32(0x7f), wide), 24);
  return _mm512_or_ps(value, _mm512_castsi512_ps(sign));
}

// Writes the values of 32 e4m3 codes times a scale. Each value is rounded once to T.
template <typename T>
inline void e4m3_run(const uint8_t* codes, float scale, T* out) {
  for (int i = 0; i < 32; i += 16) store16(out + i, _mm512_mul_ps(e4m3_values(codes + i), _mm512_set1_ps(scale)));
}

// Writes the 32 values of 16 bytes of codes. tables: the 16 values of the codes of all columns, or, if `two` is true,
// 16 values for the first 16 columns and then 16 values for the last 16 columns. Each value is rounded once to T.
template <Nibbles kNibbles, typename T>
inline void lookup32(const uint8_t* codes, const float* tables, bool two, T* out) {
  const __m256i first = round16(tables, T{});
  __m512i index = word_indices<kNibbles>(codes), table = _mm512_broadcast_i64x4(first);
  if (two) {  // bit 4 of a lookup's index selects the second table
    const __m512i second_half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    index = _mm512_ternarylogic_epi32(index, _mm512_set1_epi16(15), second_half, 0xEA);  // (a & b) | c
    table = _mm512_inserti64x4(table, round16(tables + 16, T{}), 1);
  }
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
}

template <Nibbles kNibbles>
inline void lookup32(const uint8_t* codes, const float* tables, bool two, float* out) {
  const __m512i words = word_indices<kNibbles>(codes);
  const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(words));
  const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1));
  _mm512_storeu_ps(out, _mm512_permutexvar_ps(first, _mm512_loadu_ps(tables)));
  _mm512_storeu_ps(out + 16, _mm512_permutexvar_ps(second, _mm512_loadu_ps(tables + (two ? 16 : 0))));
}

}  // namespace
}  // namespace peft_ext
