// The product of a left and a right operand (see attention/kernels.h) with AMX-BF16 tiles; product.h has the same names
// for vectors. Include this file after the target pragma (cpu/target_<isa>.h), the headers that define Vec and the
// operands' words, and linear/cpu/tiles/amx.h or amx_emulated.h.
//
// A left operand is a sequence of tiles of 16 rows by 32 values of depth, each in 1 KiB of contiguous memory: in a
// row-major matrix, all 16 rows of a tile could fall into one set of the L1 cache. A tile of a right operand is 16
// words of depth by 16 lanes. The sums of 2 x 2 tiles of the result stay in tile registers. Each step of the depth
// loads two tiles of the left and two tiles of the right operand for four products of 16 x 16 x 32.
#pragma once

#include <string.h>

#include "attention/kernels.h"

namespace peft_ext {
namespace {

constexpr int64_t kLeftRows = 16;         // rows of left operands are padded to a multiple of kLeftRows
constexpr int64_t kDepth = 32;            // the depth of operands is padded with zeros to a multiple of kDepth
constexpr int64_t kRows = 2 * kLeftRows;  // number of rows of a left operand (keys) in a strip
constexpr int64_t kWidth = Vec::kWidth;
constexpr bool kInPlace = false;  // whether a product can read rows of k and v in place

// Under a causal mask, the backward's products that sum over queries begin with the first query that sees a strip of
// keys; this query must be the first of a tile.
static_assert(kRows % kDepth == 0, "the first query that sees a strip must be the first of a tile");

struct ProductUnit {  // exists while a thread computes a unit of work; configures and releases the tile registers
  ProductUnit() { amx_configure(); }
  ProductUnit(const ProductUnit&) = delete;
  ProductUnit& operator=(const ProductUnit&) = delete;
  ~ProductUnit() { amx_release(); }
};

// Computes up to 2 x 2 tiles of a product: c = left right, or c += left right if `add`. c is row-major.
template <bool kTwoLeft, bool kTwoRight>
inline void multiply_tiles(const Element* left, int64_t left_stride, const Element* right, int64_t right_stride,
                           int64_t tiles, float* c, int64_t c_stride, bool add) {
  constexpr int64_t kTile = kLeftRows * kDepth, kTileWords = kDepth / kWord;
  const int64_t right_bytes = right_stride * static_cast<int64_t>(sizeof(Element));
  const int64_t c_bytes = c_stride * static_cast<int64_t>(sizeof(float));
  float* lower = c + kLeftRows * c_stride;
  AMX_MEMORY_BARRIER();
  if (add) {
    AMX_LOAD_ROWS(0, c, c_bytes);
    if (kTwoRight) AMX_LOAD_ROWS(1, c + kWidth, c_bytes);
    if (kTwoLeft) AMX_LOAD_ROWS(2, lower, c_bytes);
    if (kTwoLeft && kTwoRight) AMX_LOAD_ROWS(3, lower + kWidth, c_bytes);
  } else {
    AMX_ZERO(0);
    if (kTwoRight) AMX_ZERO(1);
    if (kTwoLeft) AMX_ZERO(2);
    if (kTwoLeft && kTwoRight) AMX_ZERO(3);
  }
  for (int64_t t = 0; t < tiles; ++t) {
    const Element* lanes = right + t * kTileWords * right_stride;
    AMX_LOAD_ROWS(6, lanes, right_bytes);
    AMX_LOAD(4, left + t * kTile);
    AMX_PRODUCT(0, 4, 6);
    if (kTwoRight) {
      AMX_LOAD_ROWS(7, lanes + kWidth * kWord, right_bytes);
      AMX_PRODUCT(1, 4, 7);
    }
    if (kTwoLeft) {
      AMX_LOAD(5, left + left_stride + t * kTile);
      AMX_PRODUCT(2, 5, 6);
      if (kTwoRight) AMX_PRODUCT(3, 5, 7);
    }
  }
  AMX_STORE_ROWS(0, c, c_bytes);
  if (kTwoRight) AMX_STORE_ROWS(1, c + kWidth, c_bytes);
  if (kTwoLeft) AMX_STORE_ROWS(2, lower, c_bytes);
  if (kTwoLeft && kTwoRight) AMX_STORE_ROWS(3, lower + kWidth, c_bytes);
}

// Computes c [rows, vecs vectors] = left right, or c += left right if `add`. Strides are in elements; left_stride is
// the distance between strips of kLeftRows rows. `steps` is a multiple of the number of words in a row of a left
// operand's tile. The function reads rows of the left operand up to a multiple of kLeftRows; rows of the left operand
// beyond `rows` do not change c.
inline void multiply(int64_t rows, int64_t vecs, const Element* left, int64_t left_stride, const Element* right,
                     int64_t right_stride, int64_t steps, float* c, int64_t c_stride, bool add) {
  const int64_t tiles = steps * kWord / kDepth;
  const auto block = [&](bool two_left, bool two_right, const Element* strips, const Element* lanes, float* to,
                         int64_t stride) {
    const auto run = two_left ? (two_right ? multiply_tiles<true, true> : multiply_tiles<true, false>)
                              : (two_right ? multiply_tiles<false, true> : multiply_tiles<false, false>);
    run(strips, left_stride, lanes, right_stride, tiles, to, stride, add);
  };
  for (int64_t r = 0; r < rows; r += 2 * kLeftRows)
    for (int64_t v = 0; v < vecs; v += 2) {
      const int64_t high = min_i64(2 * kLeftRows, rows - r), wide = min_i64(2, vecs - v);
      const Element* strips = left + r / kLeftRows * left_stride;
      const Element* lanes = right + v * kWidth * kWord;
      float* to = c + r * c_stride + v * kWidth;
      if (high % kLeftRows == 0) {
        block(high > kLeftRows, wide == 2, strips, lanes, to, c_stride);
        continue;
      }
      // Incomplete tiles of the last rows are computed in `sums` and copied to c, because c may have no memory after
      // its last row.
      constexpr int64_t kSide = 2 * kLeftRows;
      alignas(64) float sums[kSide * kSide];
      const size_t bytes = static_cast<size_t>(wide * kWidth) * sizeof(float);
      if (add)
        for (int64_t i = 0; i < high; ++i) memcpy(sums + i * kSide, to + i * c_stride, bytes);
      block(high > kLeftRows, wide == 2, strips, lanes, sums, kSide);
      for (int64_t i = 0; i < high; ++i) memcpy(to + i * c_stride, sums + i * kSide, bytes);
    }
}

}  // namespace
}  // namespace peft_ext
