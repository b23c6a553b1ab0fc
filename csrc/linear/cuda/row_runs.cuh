// Divides the rows of a mixture of experts, which are sorted by expert, for the passes over activations and the
// experts' product: into tiles of 64 rows of one expert, and into chunks of tiles.
//
// The rows of an expert fill ceil(rows / 64) tiles. Rows of no expert fill the tiles after the last expert's tiles.
// Only the device knows which rows an expert has: a launch has blocks for the largest possible number of tiles, and a
// block without a tile returns. Small matrices that belong to rows are stored in the order of the tiles, 64 rows per
// tile.
#pragma once

#include "linear/cuda/row_tiles.cuh"

namespace peft_ext {

struct RowRun {
  int32_t first, rows;  // first row and number of rows in the matrix; rows is 0 if the run is unused
  int32_t tile;         // index of the first tile of the run's rows
  int32_t expert;       // index of the expert; -1: no expert
  int32_t before;       // number of the expert's rows that come before `first`
};

// Number of tiles in a chunk. Sums over more than kChunkRows rows of an expert are divided among several blocks, one
// for each chunk.
constexpr int kChunkTiles = 16;
constexpr int kChunkRows = kChunkTiles * kTileRows;

}  // namespace peft_ext
