// Defines multiply() of the tile kernels with Arm's bfloat16 matrix product (BFMMLA). block.h describes what multiply()
// must compute. Include this file after the target pragma (cpu/target_<isa>.h).
//
// One BFMMLA instruction multiplies two rows with two lanes over four values of the depth; one register holds the 2 x 2
// sums. The tiles of both operands therefore have the layout [8 steps of four of the depth][8 pairs of rows or
// lanes][2][4], where a register holds one step of one pair. The sums of 8 rows by 8 lanes are in 16 registers. For
// each step of the depth, the kernel loads four pairs of rows and four pairs of lanes, and computes 16 products.
#pragma once

#include <arm_neon.h>

#include "cpu/simd_neon.h"
#include "linear/cpu/tiles/tiles.h"

namespace peft_ext {
namespace {

struct TileUnit {
  TileUnit() {}
};

// kDepthStep: number of values of the depth in one step, over which one BFMMLA sums; kPair: number of values that a
// pair of rows has in a step.
constexpr int64_t kDepthStep = 4, kPair = 2 * kDepthStep;
constexpr int kPairs = 4;  // number of row pairs, and of lane pairs, in registers
constexpr int64_t kRowsOfStep = 2 * kPairs;
constexpr int64_t kDecodeStrips = 1;
inline Strips rows_of(const bf16* matrix, int64_t) { return Strips{matrix, 0}; }
constexpr int64_t kFewStrips = 0;
inline bool decodes_rows(const TileWeight&) { return false; }
inline Strips decoded_rows(const TileWeight&, int64_t) { return Strips{}; }

// Returns the offset of the element d of the depth of row (or lane) i in a strip.
constexpr int64_t tile_offset(int64_t i, int64_t d) {
  return d / kTileDepth * kTile + d % kTileDepth / kDepthStep * kStrip * kDepthStep + i * kDepthStep + d % kDepthStep;
}

inline bfloat16x8_t pair_of(const bf16* x) { return vreinterpretq_bf16_u16(vld1q_u16(words_of(x))); }

// Adds the product of 8 rows and 8 lanes over `tiles` tiles to c. left and right point to the first pair of rows and of
// lanes.
inline void multiply_pairs(const bf16* left, const bf16* right, int64_t tiles, float* c, Ahead* ahead) {
  float32x4_t sums[kPairs][kPairs];
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kPairs; ++j) {
      const float* at = c + 2 * i * kStrip + 2 * j;
      sums[i][j] = vcombine_f32(vld1_f32(at), vld1_f32(at + kStrip));
    }
  for (int64_t d = 0; d < tiles; ++d) {
    ahead->fetch();
#pragma GCC unroll 2
    for (int64_t step = 0; step < kTileDepth / kDepthStep; ++step) {
      const int64_t at = d * kTile + step * kStrip * kDepthStep;
      bfloat16x8_t rows[kPairs];
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i) rows[i] = pair_of(left + at + i * kPair);
#pragma GCC unroll 4
      for (int j = 0; j < kPairs; ++j) {
        const bfloat16x8_t lanes = pair_of(right + at + j * kPair);
#pragma GCC unroll 4
        for (int i = 0; i < kPairs; ++i) sums[i][j] = vbfmmlaq_f32(sums[i][j], rows[i], lanes);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kPairs; ++j) {
      float* at = c + 2 * i * kStrip + 2 * j;
      vst1_f32(at, vget_low_f32(sums[i][j]));
      vst1_f32(at + kStrip, vget_high_f32(sums[i][j]));
    }
}

inline void multiply(const Strips& left, int left_strips, const Strips& right, int right_strips, int64_t tiles,
                     float* c, Ahead* ahead) {
  constexpr int64_t kHalf = 2 * kPairs;
  Ahead nothing;
  for (int i = 0; i < left_strips; ++i)
    for (int64_t row = 0; row < kStrip; row += kHalf)
      for (int j = 0; j < right_strips; ++j)
        for (int64_t lane = 0; lane < kStrip; lane += kHalf)
          multiply_pairs(left.at + i * left.stride + row * kDepthStep, right.at + j * right.stride + lane * kDepthStep,
                         tiles, c + (2 * i + j) * kStrip * kStrip + row * kStrip + lane,
                         j == 0 && lane == 0 ? ahead : &nothing);
}

}  // namespace
}  // namespace peft_ext
