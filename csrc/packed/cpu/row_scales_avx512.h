// Decodes the scales and zero points of integer codes, 16 blocks of 32 columns at a time, with AVX-512. Include this
// file after the target pragma.
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

constexpr int64_t kMostBlocks = 128;  // largest number of blocks of 32 columns in a chunk

// The scales and the addends of the blocks of a chunk, followed by 16 zeros.
struct BlockScales {
  alignas(64) float scale[kMostBlocks + 16];
  alignas(64) float add[kMostBlocks + 16];
};

// Writes the scales of `count` blocks of 32 columns from block `block` of a row on. Each group of `together` blocks has
// one scale, and `first` is the index of the row's first scale. If kAdds, writes addends(index of the scale, group,
// mask of 16 groups) * scale, too.
template <bool kAdds, typename Addends>
inline void decode_blocks(const void* scales, ScaleType type, int64_t first, int64_t together, int64_t block,
                          int64_t count, const Addends& addends, BlockScales* out) {
  const bool aligned = together <= 16 && (together & (together - 1)) == 0 && block % together == 0;
  const int shift = aligned ? __builtin_ctzll(static_cast<unsigned long long>(together)) : 0;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i spread = _mm512_srl_epi32(lane, _mm_cvtsi32_si128(shift));
  for (int64_t i = 0; i < count;) {
    // One round of the loop handles 16 blocks, or the blocks of one group.
    const int64_t group = aligned ? (block + i) >> shift : (block + i) / together;
    const int64_t blocks = min_i64(count - i, aligned ? 16 : (group + 1) * together - block - i);
    const int64_t groups = aligned ? ((blocks - 1) >> shift) + 1 : 1;
    const auto mask = static_cast<__mmask16>((1 << groups) - 1);
    __m512 scale = scales16(scales, type, first + group, mask), add = _mm512_setzero_ps();
    if constexpr (kAdds) add = _mm512_mul_ps(addends(first + group, group, mask), scale);
    scale = _mm512_permutexvar_ps(aligned ? spread : _mm512_setzero_si512(), scale);
    add = _mm512_permutexvar_ps(aligned ? spread : _mm512_setzero_si512(), add);
    for (int64_t done = 0; done < blocks; done += 16) {
      _mm512_storeu_ps(out->scale + i + done, scale);
      if (kAdds) _mm512_storeu_ps(out->add + i + done, add);
    }
    i += blocks;
  }
  _mm512_storeu_ps(out->scale + count, _mm512_setzero_ps());
  if (kAdds) _mm512_storeu_ps(out->add + count, _mm512_setzero_ps());
}

}  // namespace
}  // namespace peft_ext
