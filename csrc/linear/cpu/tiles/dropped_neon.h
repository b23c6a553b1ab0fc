// Computes the products with the few elements that dropout drops, on Arm. dropped_avx512.h explains the algorithm.
// Include this file after the target pragma (cpu/target_<isa>.h) and after microkernel_neon.h.
#pragma once

#include "linear/cpu/tiles/block.h"
#include "linear/cpu/tiles/decode_neon.h"

namespace peft_ext {
namespace {

// Transposes a panel of W that is stored as strips of rows: each row of out [32 · tiles, kPanelStep] is a column of W.
inline void turn_rows(const bf16* panel, int64_t strips, int64_t tiles, bf16* out) {
  for (int64_t s = 0; s < ceil_div(strips, 2) * 2; ++s)
    for (int64_t d = 0; d < tiles * kTileDepth; ++d)
      for (int64_t i = 0; i < kStrip; ++i)
        out[d * kPanelStep + s * kStrip + i] = s < strips ? panel[s * tiles * kTile + tile_offset(i, d)] : bf16{};
}

// Converts a panel of W that is stored as strips of lanes: each row of out [16 · strips, 32 · tiles] is a lane of the
// panel, a column of W.
inline void turn_lanes(const bf16* panel, int64_t strips, int64_t tiles, bf16* out) {
  for (int64_t s = 0; s < strips; ++s)
    for (int64_t i = 0; i < kStrip; ++i)
      for (int64_t d = 0; d < tiles * kTileDepth; d += kDepthStep)
        vst1_u16(words_of(out + (s * kStrip + i) * tiles * kTileDepth + d),
                 vld1_u16(words_of(panel + s * tiles * kTile + tile_offset(i, d))));
}

// The kernel TileKernels::dropped_entries.
void dropped_entries(const TokenStrips& work, const DroppedEntries& out, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    uint32_t* to = out.entries + out.first[t];
    for (int64_t k = 0; k < work.depth; k += 32)
      for (uint32_t left = ~work.keep[t * work.keep_words + k / 32] & first_bits(work.depth - k); left != 0;
           left &= left - 1) {
        const int64_t column = k + __builtin_ctz(left);
        *to++ = static_cast<uint32_t>(column) << 16 | work.m[t * work.depth + column].bits;
      }
    const uint32_t last = to > out.entries + out.first[t] ? to[-1] & 0xffff0000u : 0u;
    while (to < out.entries + out.first[t + 1]) *to++ = last;
  }
}

// Computes out [kPanelStep], the sum over one token's DroppedEntries of the entry's value times the entry's column of
// W. The columns of W are the rows of `turned`, and only the first kCount values of each row are used. The columns of
// two entries are interleaved for BFDOT.
template <int kCount>
inline void dropped_sums(const uint32_t* entries, int64_t count, const bf16* turned, float* out) {
  static_assert(kDroppedStep % 2 == 0);
  for (int at = 0; at < kCount; at += 32) {
    float32x4_t sums[8];
    for (float32x4_t& sum : sums) sum = vdupq_n_f32(0.0f);
    for (int64_t e = 0; e < count; e += 2) {
      const uint32_t one = entries[e], two = entries[e + 1];
      const auto x = vreinterpretq_bf16_u32(vdupq_n_u32((one & 0xffffu) | two << 16));
      const Values32 first = values32(turned + (one >> 16) * kPanelStep + at);
      const Values32 second = values32(turned + (two >> 16) * kPanelStep + at);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint16x8_t a = first.words[i], b = second.words[i];
        sums[2 * i] = vbfdotq_f32(sums[2 * i], vreinterpretq_bf16_u16(vzip1q_u16(a, b)), x);
        sums[2 * i + 1] = vbfdotq_f32(sums[2 * i + 1], vreinterpretq_bf16_u16(vzip2q_u16(a, b)), x);
      }
    }
    for (int i = 0; i < 8; ++i) vst1q_f32(out + at + 4 * i, sums[i]);
  }
}

// Computes out [32, kPanelStep]: the product E of the dropped elements of up to 32 tokens, from `token` on, with `rows`
// rows of W.
inline void dropped_product(const TileForward& work, int64_t rows, int64_t token, const bf16* turned, float* out) {
  for (int64_t t = token; t < min_i64(work.tokens, token + 2 * kStrip); ++t) {
    const uint32_t* entries = work.rest.entries + work.rest.first[t];
    const int64_t count = work.rest.first[t + 1] - work.rest.first[t];
    (rows > 32 ? dropped_sums<64> : dropped_sums<32>)(entries, count, turned, out + (t - token) * kPanelStep);
  }
}

// Returns grad · row, a dot product of `depth` values. `row` is padded with zeros to a multiple of 32 values.
inline float dot(const bf16* grad, int64_t depth, const bf16* row) {
  float32x4_t sums[4];
  for (float32x4_t& sum : sums) sum = vdupq_n_f32(0.0f);
  for (int64_t d = 0; d < depth; d += kTileDepth) {
    const Values32 left = depth - d >= kTileDepth ? values32(grad + d) : values32(grad + d, depth - d);
    const Values32 right = values32(row + d);
    for (int i = 0; i < 4; ++i)
      sums[i] = vbfdotq_f32(sums[i], vreinterpretq_bf16_u16(left.words[i]), vreinterpretq_bf16_u16(right.words[i]));
  }
  return vaddvq_f32(vaddq_f32(vaddq_f32(sums[0], sums[1]), vaddq_f32(sums[2], sums[3])));
}

// Sets the elements of a block of dX that dropout drops to dot products of dY and columns of W. columns: W's columns
// from `column` on, each padded with zeros to a multiple of 32 values.
inline void dropped_dots(const TileBackward& work, int64_t column, int64_t strip, const bf16* columns, Block* block) {
  const int64_t n = work.weight.rows, stride = tiles_of(n) * kTileDepth;
  const uint32_t inside = first_bits(min_i64(32, work.weight.columns - column));
  for (int64_t r = 0; r < min_i64(block->left * kStrip, work.tokens - strip * kStrip); ++r) {
    const int64_t token = strip * kStrip + r;
    float* to = block->part(static_cast<int>(r / kStrip), 0) + r % kStrip * kStrip;
    for (uint32_t left = ~work.keep[token * work.keep_words + column / 32] & inside; left != 0; left &= left - 1) {
      const int64_t k = __builtin_ctz(left);
      to[k / kStrip * kStrip * kStrip + k % kStrip] = dot(work.given + token * n, n, columns + k * stride);
    }
  }
}

}  // namespace
}  // namespace peft_ext
