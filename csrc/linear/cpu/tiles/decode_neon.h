// Converts a panel of W to strips, on Arm: rows of W for the forward, columns of W for the backward. A packed weight is
// decoded while the panel is converted. Include this file after the target pragma (cpu/target_<isa>.h) and after
// microkernel_neon.h.
#pragma once

#include "linear/cpu/tiles/panels.h"
#include "linear/cpu/tiles/row_neon.h"
#include "nf4/cpu/nf4_codes_neon.h"
#include "nf4/nf4_code.h"

namespace peft_ext {
namespace {

struct Values32 {
  uint16x8_t words[4];
};

inline Values32 values32(const bf16* from) {
  Values32 out;
  for (int i = 0; i < 4; ++i) out.words[i] = vld1q_u16(words_of(from + 8 * i));
  return out;
}

// Loads the first `count` of 32 values, and sets the other values to zero.
inline Values32 values32(const bf16* from, int64_t count) {
  bf16 lanes[kTileDepth] = {};
  if (count > 0) memcpy(lanes, from, static_cast<size_t>(min_i64(kTileDepth, count)) * sizeof(bf16));
  return values32(lanes);
}

// Writes the 16 values that the codes of an NF4 block stand for, rounded to bfloat16, to `out`.
inline void block_values(const TileWeight& w, int64_t block, bf16* out) {
  const Vec scale = Vec::broadcast(w.absmax[block]);
  Vec values[4];
  for (int i = 0; i < 4; ++i) values[i] = Vec::mul(Vec::load(kNf4Code + 4 * i), scale);
  for (int i = 0; i < 4; i += 2)
    vst1q_u16(words_of(out + 4 * i), vreinterpretq_u16_bf16(rounded8(values[i], values[i + 1])));
}

inline Values32 decode32(const uint8_t* packed, WordPlanes table) {
  const Nibbles codes = nibbles(packed);
  uint16x8_t words[2][2];  // words[0] has the values of the even elements, and words[1] the values of the odd elements
  for (int i = 0; i < 2; ++i) {
    const uint8x16_t index = i == 0 ? codes.even : codes.odd;
    const uint8x16_t low = vqtbl1q_u8(table.val[0], index), high = vqtbl1q_u8(table.val[1], index);
    words[i][0] = vreinterpretq_u16_u8(vzip1q_u8(low, high));
    words[i][1] = vreinterpretq_u16_u8(vzip2q_u8(low, high));
  }
  return {{vzip1q_u16(words[0][0], words[1][0]), vzip2q_u16(words[0][0], words[1][0]),
           vzip1q_u16(words[0][1], words[1][1]), vzip2q_u16(words[0][1], words[1][1])}};
}

// Decodes `count` flat elements of an NF4 weight, from element `flat` on. The range of elements may begin and end
// anywhere in an NF4 block or byte.
inline void decode_run(const TileWeight& w, int64_t flat, int64_t count, bf16* out) {
  for (int64_t i = 0; i < count;) {
    const int64_t at = flat + i, block = at >> w.block_shift;
    const int64_t stop = min_i64(((block + 1) << w.block_shift) - at, count - i);
    bf16 values[16];
    block_values(w, block, values);
    for (int64_t j = 0; j < stop; ++j) {
      const uint8_t byte = w.packed[(at + j) / 2];
      out[i + j] = values[(at + j) % 2 == 0 ? byte >> 4 : byte & 15];
    }
    i += stop;
  }
}

// Decodes (or copies, for a dense weight) the first `count` of 64 columns of a row, followed by zeros. `column` is a
// multiple of 64.
inline void decode64(const TileWeight& w, bool aligned, int64_t row, int64_t column, int64_t count, Values32* out) {
  const int64_t flat = row * w.columns + column;
  if (aligned) {
    bf16 values[16];
    block_values(w, flat >> w.block_shift, values);
    const WordPlanes table = planes_of(values);
    out[0] = decode32(w.packed + flat / 2, table);
    out[1] = decode32(w.packed + flat / 2 + 16, table);
    return;
  }
  if (w.dense != nullptr) {
    out[0] = count >= 32 ? values32(w.dense + flat) : values32(w.dense + flat, count);
    out[1] = count >= 64 ? values32(w.dense + flat + 32) : values32(w.dense + flat + 32, count - 32);
    return;
  }
  bf16 run[kPanelStep] = {};
  if (w.decode != nullptr)
    decode_block(w, row, 1, column, kPanelStep, run, kPanelStep);
  else
    decode_run(w, flat, count, run);
  out[0] = values32(run);
  out[1] = values32(run + 32);
}

// Stores 32 values into a tile: the values along the depth of row (or lane) i of the tile's strip.
inline void put_row(const Values32& values, int64_t i, bf16* tile) {
  for (int q = 0; q < 4; ++q) {
    vst1_u16(words_of(tile + tile_offset(i, 8 * q)), vget_low_u16(values.words[q]));
    vst1_u16(words_of(tile + tile_offset(i, 8 * q + kDepthStep)), vget_high_u16(values.words[q]));
  }
}

// Converts W's rows [begin, end) to strips. Each strip has `tiles` tiles along W's columns, from the tile with the
// number `from` on. `from` is even.
inline void weight_rows(const TileWeight& w, int64_t begin, int64_t end, int64_t from, int64_t tiles, bf16* panel) {
  const bool aligned = aligned_blocks(w);
  for (int64_t row = begin; row < ceil_div(end - begin, kStrip) * kStrip + begin; ++row) {
    const int64_t i = row - begin;
    bf16* out = panel + i / kStrip * tiles * kTile;
    for (int64_t d = 0; d < tiles; d += 2) {
      Values32 values[2] = {};
      const int64_t column = (from + d) * kTileDepth;
      if (tiles < tiles_of(w.columns)) fetch_row_part(w, row, column);
      if (row < end) decode64(w, aligned, row, column, min_i64(kPanelStep, w.columns - column), values);
      put_row(values[0], i % kStrip, out + d * kTile);
      if (d + 1 < tiles) put_row(values[1], i % kStrip, out + (d + 1) * kTile);
    }
  }
}

// Converts W's columns [begin, end) to strips of lanes. Each strip has `tiles` tiles along W's rows, from the tile with
// the number `from` on. begin is a multiple of kPanelStep.
inline void weight_lanes(const TileWeight& w, int64_t begin, int64_t end, int64_t from, int64_t tiles, bf16* panel) {
  const int64_t strip = tiles * kTile, first = from * kTileDepth;
  const bool aligned = aligned_blocks(w);
  for (int64_t column = begin; column < end; column += kPanelStep) {
    const int64_t count = min_i64(kPanelStep, end - column), strips = ceil_div(count, kStrip);
    bf16* base = panel + (column - begin) / kStrip * strip;
    for (int64_t row = first; row < first + tiles * kTileDepth; row += kDepthStep) {
      Values32 values[kDepthStep][2] = {};
      fetch_rows(w, row, column);
      fetch_rows(w, row + 2, column);
      for (int64_t i = 0; i < min_i64(kDepthStep, w.rows - row); ++i)
        decode64(w, aligned, row + i, column, count, values[i]);
      bf16* out = base + tile_offset(0, row - first);
      // Interleaves eight columns of four rows a, b, c and d: the first of four registers is [a0 b0 c0 d0 a1 b1 c1 d1].
      for (int64_t j = 0; j < 2 * strips; ++j) {
        const auto of_row = [&](int i) { return values[i][j / 4].words[j % 4]; };
        const uint32x4_t ab[2] = {vreinterpretq_u32_u16(vzip1q_u16(of_row(0), of_row(1))),
                                  vreinterpretq_u32_u16(vzip2q_u16(of_row(0), of_row(1)))};
        const uint32x4_t cd[2] = {vreinterpretq_u32_u16(vzip1q_u16(of_row(2), of_row(3))),
                                  vreinterpretq_u32_u16(vzip2q_u16(of_row(2), of_row(3)))};
        uint16_t* to = words_of(out + j / 2 * strip + j % 2 * 8 * kDepthStep);
        for (int half = 0; half < 2; ++half) {
          vst1q_u16(to + (2 * half) * kPair, vreinterpretq_u16_u32(vzip1q_u32(ab[half], cd[half])));
          vst1q_u16(to + (2 * half + 1) * kPair, vreinterpretq_u16_u32(vzip2q_u32(ab[half], cd[half])));
        }
      }
    }
  }
}

}  // namespace
}  // namespace peft_ext
