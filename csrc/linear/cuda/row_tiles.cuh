// Divides the rows of a mixed batch, in which each sample has an adapter or none, into tiles of 64 rows with one
// adapter.
//
// The tokens of an adapter, wherever these tokens are in the batch, fill ceil(T_g / 64) tiles: row j of tile i is token
// rows[64 i + j], or -1 after the adapter's last token. Tokens without an adapter have the last tiles. The passes over
// activations (rank_pass.cuh, expand.cuh) find the rows of a tile in RowTable::rows, and the factor of the tile in its
// RowTile. For every order of the samples there are at most T / 64 + G + 1 tiles, each with one of the G adapters or
// none. A token is multiplied only with the matrices of its own adapter, so that infinities or NaNs of one adapter do
// not reach other tokens.
#pragma once

#include "cuda/ptx.cuh"

namespace peft_ext {

constexpr int kTileRows = 64;

struct RowTile {
  int32_t factor;  // index of the tile's factor, or -1 for none
  int32_t rank;    // rank of the tile's adapter, before padding
  float scaling;
};

struct RowTable {
  const int32_t* rows = nullptr;   // [tiles][kTileRows]: row of the matrix for each row of each tile, or -1
  const RowTile* tiles = nullptr;  // one RowTile for each tile; null: rows are in order and have one factor
};

}  // namespace peft_ext
