// The rows of a mixture of experts, sorted by expert, as the passes over activations and the experts' product go
// through them: in tiles of 64 rows of one expert, and in chunks of tiles.
//
// An expert's rows fill ceil(rows / 64) tiles, those of no expert, behind the last one's, theirs. Which rows an expert
// has is known on the device alone: a launch has blocks for as many tiles as there may be, and those that find none
// leave. Small matrices that go with rows lie in the tiles' order, 64 rows a tile.
#pragma once

#include "linear/cuda/row_tiles.cuh"

namespace peft_ext {

struct RowRun {
  int32_t first, rows;  // of the matrix; rows 0: there is none
  int32_t tile;         // the first of its tiles
  int32_t expert;       // -1: no expert's
  int32_t before;       // rows of the expert before the first
};

// A chunk: from so many rows on the sums over an expert's are of several blocks.
constexpr int kChunkTiles = 16;
constexpr int kChunkRows = kChunkTiles * kTileRows;

}  // namespace peft_ext
