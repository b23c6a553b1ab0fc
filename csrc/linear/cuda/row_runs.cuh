// Divides the rows of a mixture of experts, which are sorted by expert, into tiles of 64 rows of one expert and into
// chunks of tiles. The rank passes over activations and the kernels in experts/cuda use these tiles and chunks.
//
// The rows of an expert fill ceil(rows / 64) tiles. Rows that belong to no expert fill the tiles after the last
// expert's tiles. The host does not know which rows an expert has, because the ends of the experts' rows are in device
// memory. Therefore a launch has thread blocks for the largest possible number of tiles, and a block without a tile
// returns at once. Small matrices with one row for each row of x are stored in the order of the tiles, 64 rows per
// tile.
#pragma once

#include "linear/cuda/row_tiles.cuh"

namespace peft_ext {

struct RowRun {
  // A run is the rows of one expert, or of none, that lie in one tile or in one chunk. `first` is the run's first row
  // in the matrix, and `rows` is the number of the run's rows, or 0 if this RowRun is unused.
  int32_t first, rows;
  int32_t tile;    // index of the first tile of the run's rows
  int32_t expert;  // index of the run's expert; -1 if the run's rows belong to no expert
  int32_t before;  // number of the expert's rows that come before `first`
};

// Number of tiles of 64 rows in a chunk. A sum over more than kChunkRows rows of an expert is divided among several
// thread blocks, one for each chunk.
constexpr int kChunkTiles = 16;
constexpr int kChunkRows = kChunkTiles * kTileRows;

}  // namespace peft_ext
