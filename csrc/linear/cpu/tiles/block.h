// A Block holds the sums of up to 2 strips of rows by 2 strips of lanes (see tiles.h), and stays in L1. The kernels
// clear a block, add products to the block, and write the block's results once. Include this file after the target
// pragma (cpu/target_<isa>.h) and after the files of an instruction set, which define these names:
//   Row: a vector of 16 sums, with the operations of the Vec of simd_<isa>.h.
//   transposed(part, rows): writes the columns of 16 x 16 sums to `rows`.
//   store_row(out, first, second, count): rounds the 32 values of two Rows to bfloat16, and stores the first `count`.
//   kLowRankRows: number of rows of sums that add_low_rank keeps in registers at a time.
//   multiply(left, left_strips, right, right_strips, tiles, c, ahead), kRowsOfStep:
//     c[i][j] += left strip i times right strip j over `tiles` tiles of the depth, for up to 2 x 2 strips.
//     c[i][j] is [16][16] float32, 1 KiB. multiply may call ahead->fetch(), which prefetches the next panel, once for
//     each kRowsOfStep rows and each tile of the depth.
//   kDecodeStrips: the cost of decoding a panel; the unit is the product of the panel with one strip of tokens.
//   rows_of(matrix, columns), kFewStrips: rows_of returns whole tiles of a row-major matrix as a left operand, without
//     a copy. The forward uses rows_of for up to kFewStrips strips of tokens, and never if kFewStrips is 0.
//   decodes_rows(weight): returns whether multiply can decode the rows of this W during the product with one strip of
//     tokens.
//   decoded_rows(weight, row): returns the left operand that decodes W's rows from `row` on.
//   TileUnit: a class of which `forward` and `backward` keep an object while they run. With AMX, the constructor of
//   TileUnit configures the tile registers, and the destructor releases the tile registers.
#pragma once

#include "linear/cpu/tiles/tiles.h"

namespace peft_ext {
namespace {

constexpr int kBlockStrips = 2;  // largest number of strips of a block, both in rows and in lanes
constexpr int kBlockElements = kBlockStrips * kBlockStrips * kStrip * kStrip;

template <typename Left>
inline void multiply(const Left& left, int left_strips, const Strips& right, int right_strips, int64_t tiles,
                     float* c) {
  Ahead nothing;
  multiply(left, left_strips, right, right_strips, tiles, c, &nothing);
}

// Memory for the sums of a block that are not carried from one part of the depth to the next.
struct BlockSums {
  alignas(64) float c[kBlockElements];
};

// A Block holds sums of a product for up to 2 strips of rows by 2 strips of lanes. `c` points to a BlockSums, or to the
// memory for sums that are carried from part to part of the depth.
struct Block {
  float* c;
  int left, right;  // `left`: number of strips of rows; `right`: number of strips of lanes

  float* part(int i, int j) { return c + (i * kBlockStrips + j) * kStrip * kStrip; }
  void copy_from(const Block& from) {
    for (int i = 0; i < kBlockElements; i += kStrip) Row::load(from.c + i).store(c + i);
  }
  void clear() {
    for (int i = 0; i < kBlockElements; i += kStrip) Row::zero().store(c + i);
  }
  // Replaces the 16 sums of each row of each 16 x 16 part of the block by f(sums, row of the block, number of the strip
  // of lanes).
  template <typename F>
  void each(const F& f) {
    for (int i = 0; i < left; ++i)
      for (int j = 0; j < right; ++j)
        for (int r = 0; r < kStrip; ++r) {
          float* row = part(i, j) + r * kStrip;
          f(Row::load(row), i * kStrip + r, j).store(row);
        }
  }
};

// Adds the low-rank term, the product of left [rows, rank] and right [rank, 16] in float32, to the j-th strip of lanes
// of the block. If kSome is true, only the lanes whose bit is set in `lanes` change.
template <bool kSome>
inline void add_low_rank(const float* left, const float* right, int64_t rank, int j, Block* block, uint16_t lanes) {
  for (int row = 0; row < block->left * kStrip; row += kLowRankRows) {
    float* c = block->part(row / kStrip, j) + row % kStrip * kStrip;
    Row sums[kLowRankRows];
    for (int r = 0; r < kLowRankRows; ++r) sums[r] = Row::load(c + r * kStrip);
    const float* rows = left + row * rank;
    for (int64_t q = 0; q < rank; ++q) {
      const Row lane = Row::load(right + q * kStrip);
      for (int r = 0; r < kLowRankRows; ++r) {
        const Row sum = Row::fma(Row::broadcast(rows[r * rank + q]), lane, sums[r]);
        sums[r] = kSome ? Row::where(lanes, sum, sums[r]) : sum;
      }
    }
    for (int r = 0; r < kLowRankRows; ++r) sums[r].store(c + r * kStrip);
  }
}

// Adds the low-rank term, left times right, to all strips of lanes of the block. `right` has one matrix [rank, 16] for
// each strip of lanes.
inline void add_low_rank(const float* left, const float* right, int64_t rank, Block* block) {
  for (int j = 0; j < block->right; ++j) add_low_rank<false>(left, right + j * rank * kStrip, rank, j, block, 0);
}

// Writes the transpose of the block to out [tokens, columns]: the block's rows become columns of out, and the block's
// lanes become rows of out. more: null, or kPanelStep values for each token of the block, which are added to the
// block's values.
inline void store_transposed(Block* block, bf16* out, int64_t token, int64_t tokens, int64_t column, int64_t columns,
                             const float* more = nullptr) {
  for (int j = 0; j < block->right; ++j) {
    Row rows[kBlockStrips][kStrip];
    for (int i = 0; i < kBlockStrips; ++i)
      if (i < block->left)
        transposed(block->part(i, j), rows[i]);
      else
        for (Row& row : rows[i]) row = Row::zero();
    const int64_t first = token + j * kStrip;
    for (int64_t t = 0; t < min_i64(kStrip, tokens - first); ++t) {
      Row low = rows[0][t], high = rows[1][t];
      if (more != nullptr) {
        const float* of_token = more + (j * kStrip + t) * kPanelStep;
        low = Row::add(low, Row::load(of_token));
        high = Row::add(high, Row::load(of_token + kStrip));
      }
      store_row(out + (first + t) * columns + column, low, high, min_i64(columns - column, 2 * kStrip));
    }
  }
}

}  // namespace
}  // namespace peft_ext
