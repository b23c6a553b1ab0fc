// A block of up to 2 x 2 strips of sums, which stays in L1: cleared, added to, and written once. Included after the
// target pragma and after the files of an instruction set, which have
//   Row: 16 sums, with the operations of the Vec of simd_<isa>.h
//   transposed(part, rows): the columns of 16 x 16 sums
//   store_row(out, first, second, count): two rows one after the other, rounded; `count` of the 32 are stored
//   kLowRankRows: rows of sums that stay in registers together
//   multiply(left, left_strips, right, right_strips, tiles, c, ahead), kRowsOfStep, kDecodeStrips:
//     c[i][j] += left strip i times right strip j, for up to 2 x 2 strips; c[i][j] is [16][16] float32, 1 KiB
//     and a step of `ahead` for each kRowsOfStep rows of it and each tile of the depth, or none
//   rows_of(matrix, columns), kFewStrips: rows of a row-major matrix as such a left operand, whole tiles of it, which
//     up to so many strips of tokens are multiplied with; none: always a copy in strips
//   decodes_rows(weight), decoded_rows(weight, row): whether rows of this W can be such a left operand, decoded on the
//     way, of one strip of tokens, and that
//   class TileUnit: an object lives while a task multiplies.
#pragma once

#include "linear/cpu/tiles/tiles.h"

namespace peft_ext {
namespace {

constexpr int kBlockStrips = 2;  // strips of a block, either way
constexpr int kBlockElements = kBlockStrips * kBlockStrips * kStrip * kStrip;

template <typename Left>
inline void multiply(const Left& left, int left_strips, const bf16* right, int right_strips, int64_t tiles, float* c) {
  Ahead nothing;
  multiply(left, left_strips, right, right_strips, tiles, c, &nothing);
}

struct Block {
  alignas(64) float c[kBlockElements];
  int left, right;  // strips

  float* part(int i, int j) { return c + (i * kBlockStrips + j) * kStrip * kStrip; }
  void clear() {
    for (int i = 0; i < kBlockElements; i += kStrip) Row::zero().store(c + i);
  }
  // f(sums, row of the block, right strip) -> sums, for every row of every part.
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

// Column j of the block's parts: c += left [rows, rank] right [rank, 16], in float32: the low-rank term, of some lanes
// where kSome says so.
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

// The same of every column; right [strips, rank, 16].
inline void add_low_rank(const float* left, const float* right, int64_t rank, Block* block) {
  for (int j = 0; j < block->right; ++j) add_low_rank<false>(left, right + j * rank * kStrip, rank, j, block, 0);
}

// The block, whose rows are columns of out and whose lanes are rows of out, transposed into out [tokens, columns];
// more: what is added, of each of the block's tokens kPanelStep values, or null.
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
