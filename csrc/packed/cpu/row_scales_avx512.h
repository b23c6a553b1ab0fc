// Decodes the scales of integer and FP8 codes, and the addends that contain the zero points, for blocks of 32 columns,
// with AVX-512. Include this file after the target pragma.
#pragma once

#include <immintrin.h>

#include "weight/packed_view.h"

namespace peft_ext {
namespace {

// Returns the scales i to i + 15 of any type except e4m3. Scales outside of `mask` are not read, and their lanes are 0.
inline __m512 scales16(const void* scales, ScaleType type, int64_t i, __mmask16 mask) {
  if (type == ScaleType::kF32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(scales) + i);
  if (type == ScaleType::kE8M0) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(scales) + i));
    const __mmask16 zero = _mm512_mask_testn_epi32_mask(mask, bytes, bytes);
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(bytes, _mm512_set1_epi32(255));
    const __m512i bits = _mm512_mask_mov_epi32(_mm512_slli_epi32(bytes, 23), zero, _mm512_set1_epi32(0x00400000));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(0x7fc00000)));
  }
  const __m256i words = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(scales) + i);
  return type == ScaleType::kF16 ? _mm512_cvtph_ps(words)
                                 : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

constexpr int64_t kMostBlocks = 128;  // number of blocks of 32 columns in a chunk (see row_products_avx512.h)

// The scales and the addends of the blocks of a chunk, followed by 16 zeros.
struct BlockScales {
  alignas(64) float scale[kMostBlocks + 16];
  alignas(64) float add[kMostBlocks + 16];
};

// Writes the scales of `count` blocks of 32 columns from block `block` of a row on. Each group of `together` blocks has
// one scale, and `first` is the index of the row's first scale. If kAdds is true, the function also writes the addends:
// addends(index of the scale, group, mask of 16 groups) * scale.
template <bool kAdds, typename Addends>
inline void decode_blocks(const void* scales, ScaleType type, int64_t first, int64_t together, int64_t block,
                          int64_t count, const Addends& addends, BlockScales* out) {
  const auto decode = [&](int64_t group, __mmask16 mask, __m512* scale, __m512* add) {
    *scale = scales16(scales, type, first + group, mask);
    *add = _mm512_setzero_ps();
    if constexpr (kAdds) *add = _mm512_mul_ps(addends(first + group, group, mask), *scale);
  };
  const auto store = [&](int64_t i, __m512 scale, __m512 add) {
    _mm512_storeu_ps(out->scale + i, scale);
    if (kAdds) _mm512_storeu_ps(out->add + i, add);
  };
  __m512 scale, add;
  if (together <= 16 && (together & (together - 1)) == 0 && block % together == 0) {  // decodes 16 groups at a time
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(together));
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = 0; i < count; i += 16 * together) {
      const int64_t groups = min_i64(16, (count - i + together - 1) >> shift);
      decode((block + i) >> shift, static_cast<__mmask16>((1 << groups) - 1), &scale, &add);
      for (int64_t done = 0; done < min_i64(16 * together, count - i); done += 16) {
        const __m512i from = _mm512_srl_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(done))),
                                              _mm_cvtsi32_si128(shift));
        store(i + done, _mm512_permutexvar_ps(from, scale), _mm512_permutexvar_ps(from, add));
      }
    }
  } else {  // decodes the scale of one group at a time
    for (int64_t i = 0; i < count;) {
      const int64_t group = (block + i) / together, stop = min_i64(count, (group + 1) * together - block);
      decode(group, 1, &scale, &add);
      for (int64_t done = i; done < stop; done += 16)
        store(done, _mm512_broadcastss_ps(_mm512_castps512_ps128(scale)),
              _mm512_broadcastss_ps(_mm512_castps512_ps128(add)));
      i = stop;
    }
  }
  _mm512_storeu_ps(out->scale + count, _mm512_setzero_ps());
  if (kAdds) _mm512_storeu_ps(out->add + count, _mm512_setzero_ps());
}

}  // namespace
}  // namespace peft_ext
