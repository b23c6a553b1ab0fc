// Defines multiply() of the tile kernels with AMX-BF16. block.h describes what multiply() must compute. Include this
// file after the target pragma (cpu/target_<isa>.h) and after amx.h or amx_emulated.h.
//
// The sums of 2 x 2 tiles stay in tile registers. For each step of the depth, the kernel loads two tiles of rows and
// two tiles of lanes, and computes four products of 16 x 16 x 32. Except for rows of W that the forward reads in place
// (kFewStrips), a tile is stored in 1 KiB of contiguous memory: if the rows of the tile were as far apart as the rows
// of a matrix, all 16 rows could fall into one set of the L1 cache.
#pragma once

#include <stdint.h>

#include "linear/cpu/tiles/tiles.h"

namespace peft_ext {
namespace {

struct TileUnit {
  TileUnit() { amx_configure(); }
  ~TileUnit() { amx_release(); }
};

constexpr int kPart = kStrip * kStrip;  // number of floats in a tile of sums
constexpr int64_t kRowsOfStep = 2 * kStrip;
constexpr int64_t kDecodeStrips = 6;
constexpr int64_t kFewStrips = 8;  // measured: up to 128 tokens, reading W's rows again from L2 is faster than a copy
inline bool decodes_rows(const TileWeight&) { return false; }
inline Strips decoded_rows(const TileWeight&, int64_t) { return Strips{}; }

// A left operand of multiply(). strip, tile and row are distances in elements: `strip` from 16 rows to the next 16
// rows, `tile` from 32 elements of the depth to the next 32, and `row` from a row to the next row.
struct Rows {
  const bf16* at;
  int64_t strip, tile, row;
};

inline Rows rows_of(const Strips& left) { return Rows{left.at, left.stride, kTile, kTileDepth}; }
// Returns a left operand that reads the rows of a row-major matrix in place, without a copy.
inline Rows rows_of(const bf16* matrix, int64_t columns) { return Rows{matrix, kStrip * columns, kTileDepth, columns}; }

template <bool kTwoLeft, bool kTwoRight>
inline void multiply_tiles(const Rows& left, const Strips& right, int64_t tiles, float* c) {
  const int64_t stride = left.row * static_cast<int64_t>(sizeof(bf16));
  AMX_MEMORY_BARRIER();
  AMX_LOAD(0, c);
  if (kTwoRight) AMX_LOAD(1, c + kPart);
  if (kTwoLeft) AMX_LOAD(2, c + 2 * kPart);
  if (kTwoLeft && kTwoRight) AMX_LOAD(3, c + 3 * kPart);
  for (int64_t d = 0; d < tiles; ++d) {
    AMX_LOAD(6, right.at + d * kTile);
    AMX_LOAD_ROWS(4, left.at + d * left.tile, stride);
    AMX_PRODUCT(0, 4, 6);
    if (kTwoRight) {
      AMX_LOAD(7, right.at + right.stride + d * kTile);
      AMX_PRODUCT(1, 4, 7);
    }
    if (kTwoLeft) {
      AMX_LOAD_ROWS(5, left.at + left.strip + d * left.tile, stride);
      AMX_PRODUCT(2, 5, 6);
      if (kTwoRight) AMX_PRODUCT(3, 5, 7);
    }
  }
  AMX_STORE(0, c);
  if (kTwoRight) AMX_STORE(1, c + kPart);
  if (kTwoLeft) AMX_STORE(2, c + 2 * kPart);
  if (kTwoLeft && kTwoRight) AMX_STORE(3, c + 3 * kPart);
}

// With AMX, multiply() does not prefetch the next panel of W: with prefetching, a step (forward and backward) of a 4096
// x 4096 layer with 48 to 512 tokens was 4 to 11% slower, because the prefetches delay the loads of tiles.
inline void multiply(const Rows& left, int left_strips, const Strips& right, int right_strips, int64_t tiles, float* c,
                     Ahead*) {
  if (left_strips == 2 && right_strips == 2) return multiply_tiles<true, true>(left, right, tiles, c);
  if (left_strips == 2) return multiply_tiles<true, false>(left, right, tiles, c);
  if (right_strips == 2) return multiply_tiles<false, true>(left, right, tiles, c);
  multiply_tiles<false, false>(left, right, tiles, c);
}
inline void multiply(const Strips& left, int left_strips, const Strips& right, int right_strips, int64_t tiles,
                     float* c, Ahead* ahead) {
  multiply(rows_of(left), left_strips, right, right_strips, tiles, c, ahead);
}

}  // namespace
}  // namespace peft_ext
