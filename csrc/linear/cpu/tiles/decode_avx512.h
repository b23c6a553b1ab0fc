// Converts a panel of W to strips with instructions of AVX-512 and AVX512-BF16: rows of W for the forward, columns of W
// for the backward. A packed weight is decoded while the panel is converted. Include this file after the target pragma
// (cpu/target_<isa>.h).
#pragma once

#include "cpu/simd_avx512.h"
#include "linear/cpu/tiles/panels.h"
#include "nf4/nf4_code.h"

namespace peft_ext {
namespace {

// Returns a table that holds two copies of the 16 values that the codes of an NF4 block stand for, rounded to bfloat16:
// vpermw reads five bits of an index, and the fifth bit of the indices of decode32 is arbitrary.
inline __m512i block_table(const TileWeight& w, int64_t block) {
  const __m512 products = _mm512_mul_ps(_mm512_loadu_ps(kNf4Code), _mm512_set1_ps(w.absmax[block]));
  return _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(products)));
}

inline __m512i decode32(const uint8_t* packed, __m512i table) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
  return _mm512_permutexvar_epi16(index, table);
}

// Decodes `count` flat elements of an NF4 weight (or copies elements of a dense weight) from element `flat` on. The
// range of elements may begin and end anywhere in an NF4 block or byte.
inline void decode_run(const TileWeight& w, int64_t flat, int64_t count, bf16* out) {
  if (w.dense != nullptr) {
    for (int64_t i = 0; i < count; ++i) out[i] = w.dense[flat + i];
    return;
  }
  for (int64_t i = 0; i < count;) {
    const int64_t at = flat + i, block = at >> w.block_shift;
    const int64_t stop = min_i64(((block + 1) << w.block_shift) - at, count - i);
    const __m512i table = block_table(w, block);
    alignas(64) uint16_t values[32];
    _mm512_store_si512(values, table);
    int64_t j = 0;
    if (at % 2 != 0) out[i + j++].bits = values[w.packed[at / 2] & 15];
    for (; j + 32 <= stop; j += 32) _mm512_storeu_si512(out + i + j, decode32(w.packed + (at + j) / 2, table));
    for (; j < stop; ++j) {
      const uint8_t byte = w.packed[(at + j) / 2];
      out[i + j].bits = values[(at + j) % 2 == 0 ? byte >> 4 : byte & 15];
    }
    i += stop;
  }
}

// Decodes (or copies, for a dense weight) the first `count` of 64 columns of a row into two registers, followed by
// zeros. `column` is a multiple of 64.
inline void decode64(const TileWeight& w, bool aligned, int64_t row, int64_t column, int64_t count, __m512i* out) {
  const int64_t flat = row * w.columns + column;
  if (aligned) {
    const __m512i table = block_table(w, flat >> w.block_shift);
    out[0] = decode32(w.packed + flat / 2, table);
    out[1] = decode32(w.packed + flat / 2 + 16, table);
    return;
  }
  if (w.dense != nullptr) {
    out[0] = _mm512_maskz_loadu_epi16(first_bits(count), w.dense + flat);
    out[1] = _mm512_maskz_loadu_epi16(first_bits(count - 32), w.dense + flat + 32);
    return;
  }
  alignas(64) bf16 run[kPanelStep] = {};
  decode_run(w, flat, count, run);
  out[0] = _mm512_load_si512(run);
  out[1] = _mm512_load_si512(run + 32);
}

// Converts W's rows [begin, end) to left strips. Each strip has `tiles` tiles along W's columns, from the tile with the
// number `from` on. `from` is even.
inline void weight_rows(const TileWeight& w, int64_t begin, int64_t end, int64_t from, int64_t tiles, bf16* panel) {
  if (w.decode != nullptr) {
    for (int64_t i = 0; i < ceil_div(end - begin, kStrip); ++i)
      for (int64_t d = 0; d < tiles; ++d)
        decode_block(w, begin + i * kStrip, kStrip, (from + d) * kTileDepth, kTileDepth,
                     panel + (i * tiles + d) * kTile, kTileDepth);
    return;
  }
  const bool aligned = aligned_blocks(w);
  for (int64_t row = begin; row < ceil_div(end - begin, kStrip) * kStrip + begin; ++row) {
    const int64_t i = row - begin;
    bf16* out = panel + i / kStrip * tiles * kTile + i % kStrip * kTileDepth;
    for (int64_t d = 0; d < tiles; d += 2) {
      __m512i values[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      const int64_t column = (from + d) * kTileDepth;
      if (tiles < tiles_of(w.columns)) fetch_row_part(w, row, column);
      if (row < end) decode64(w, aligned, row, column, min_i64(kPanelStep, w.columns - column), values);
      _mm512_store_si512(out + d * kTile, values[0]);
      if (d + 1 < tiles) _mm512_store_si512(out + (d + 1) * kTile, values[1]);
    }
  }
}

// Converts W's columns [begin, end) to right strips. Each strip has `tiles` tiles along W's rows, from the tile with
// the number `from` on. begin is a multiple of kPanelStep.
inline void weight_lanes(const TileWeight& w, int64_t begin, int64_t end, int64_t from, int64_t tiles, bf16* panel) {
  const int64_t strip = tiles * kTile;
  const bool aligned = aligned_blocks(w);
  __m512i low, high;  // indices that interleave the 16-bit words of two rows of W
  {
    alignas(64) uint16_t index[64];
    for (int i = 0; i < 64; ++i) index[i] = static_cast<uint16_t>(i / 2 + (i % 2) * 32);
    low = _mm512_load_si512(index);
    high = _mm512_load_si512(index + 32);
  }
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t column = begin; column < end; column += kPanelStep) {
      const int64_t count = min_i64(kPanelStep, end - column), strips = ceil_div(count, kStrip);
      bf16* out = panel + (column - begin) / kStrip * strip + tile * kTile;
      alignas(64) bf16 held[kTileDepth * kPanelStep];  // 32 rows of a packed weight, decoded by w.decode
      if (w.decode != nullptr)
        decode_block(w, (from + tile) * kTileDepth, kTileDepth, column, kPanelStep, held, kPanelStep);
      for (int64_t i = 0; i < kTileDepth; i += 2) {
        const int64_t row = (from + tile) * kTileDepth + i;
        __m512i even[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()}, odd[2] = {even[0], even[1]};
        fetch_rows(w, row, column);
        if (w.decode != nullptr) {
          const bf16* at = held + i * kPanelStep;
          for (int half = 0; half < 2; ++half) {
            even[half] = _mm512_load_si512(at + 32 * half);
            odd[half] = _mm512_load_si512(at + kPanelStep + 32 * half);
          }
        } else {
          if (row < w.rows) decode64(w, aligned, row, column, count, even);
          if (row + 1 < w.rows) decode64(w, aligned, row + 1, column, count, odd);
        }
        for (int64_t j = 0; j < strips; ++j)
          _mm512_store_si512(out + j * strip + i * kStrip,
                             _mm512_permutex2var_epi16(even[j / 2], j % 2 ? high : low, odd[j / 2]));
      }
    }
}

}  // namespace
}  // namespace peft_ext
