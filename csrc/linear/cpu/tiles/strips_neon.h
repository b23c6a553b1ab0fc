// Converts activations to strips, on Arm, and applies the dropout mask and the scale at the same time. Strips of rows
// and strips of lanes have the same layout. Include this file after the target pragma (cpu/target_<isa>.h) and after
// microkernel_neon.h.
#pragma once

#include "linear/cpu/tiles/decode_neon.h"

namespace peft_ext {
namespace {

// Returns the 32 columns from d on of a row of m, after the dropout mask and the scale, with zeros beyond the matrix.
inline Values32 token_values(const TokenStrips& work, int64_t row, int64_t d) {
  if (row >= work.tokens) return Values32{};
  const int64_t left = min_i64(kTileDepth, work.depth - d);
  const bf16* from = work.m + row * work.depth + d;
  Values32 out = left == kTileDepth ? values32(from) : values32(from, left);
  if (work.scale != nullptr) {
    float scale[kTileDepth] = {};
    memcpy(scale, work.scale + d, static_cast<size_t>(left) * sizeof(float));
    for (int i = 0; i < 4; ++i) {
      const float32x4_t low = vmulq_f32(widen_bf16(vget_low_u16(out.words[i])), vld1q_f32(scale + 8 * i));
      const float32x4_t high = vmulq_f32(widen_bf16(vget_high_u16(out.words[i])), vld1q_f32(scale + 8 * i + 4));
      out.words[i] = vreinterpretq_u16_bf16(rounded8({low}, {high}));
    }
  }
  if (work.keep != nullptr) {
    static constexpr uint16_t kBits[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    const uint32_t word = work.keep[row * work.keep_words + d / 32];
    for (int i = 0; i < 4; ++i) {
      const uint16x8_t bits = vdupq_n_u16(static_cast<uint16_t>(word >> 8 * i & 255));
      out.words[i] = vandq_u16(out.words[i], vtstq_u16(bits, vld1q_u16(kBits)));
    }
  }
  return out;
}

void token_strips(const TokenStrips& work, int64_t begin, int64_t end) {
  const int64_t tiles = tiles_of(work.depth);
  for (int64_t strip = begin; strip < end; ++strip)
    for (int64_t i = 0; i < kStrip; ++i)
      for (int64_t d = 0; d < tiles; ++d)
        put_row(token_values(work, strip * kStrip + i, d * kTileDepth), i, work.strips + (strip * tiles + d) * kTile);
}

}  // namespace
}  // namespace peft_ext
