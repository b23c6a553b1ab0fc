// Divides the rows of a mixed batch, which has an adapter for each sample, into tiles of 64 rows with one adapter.
//
// The tokens of an adapter fill ceil(T_g / 64) tiles, wherever in the batch they are: row j of tile i is token
// rows[64 i + j], or -1 after the adapter's last token. Tokens without an adapter have the last tiles. The passes over
// activations (rank_pass.cuh, expand.cuh) find their rows by this table, and a tile's factor by RowTile. The passes
// compute at most T / 64 + G tiles, each with one adapter's ranks, for every order of the samples. The values of one
// adapter never reach another adapter's tokens.
#pragma once

#include "cuda/ptx.cuh"

namespace peft_ext {

constexpr int kTileRows = 64;

struct RowTile {
  int32_t factor;  // index of the factor, or -1 for none
  int32_t rank;    // rank of the adapter, before padding
  float scaling;
};

struct RowTable {
  const int32_t* rows = nullptr;   // [tiles][kTileRows]: row of the matrix, or -1
  const RowTile* tiles = nullptr;  // null: rows are in order, and all rows have one factor
};

}  // namespace peft_ext
