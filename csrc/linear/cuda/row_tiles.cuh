// Divides the rows of a mixed batch, in which each sample has an adapter or none, into tiles of 64 rows with one
// adapter.
//
// The T_g tokens of adapter g, wherever these tokens are in the batch of T tokens, fill ceil(T_g / 64) tiles: row j of
// tile i is token rows[64 i + j], or -1 after the adapter's last token. Tokens without an adapter have the last tiles.
// The passes over activations (rank_pass.cuh, expand.cuh) find the rows of a tile in RowTable::rows, and the adapter of
// the tile, whose A or B is the factor of the pass, in RowTable::tiles. For every order of the samples there are at
// most T / 64 + G + 1 tiles, each with one of the G adapters or none. A token is multiplied only with the matrices of
// its own adapter, so that infinities or NaNs of one adapter do not reach other tokens.
#pragma once

#include "cuda/ptx.cuh"

namespace peft_ext {

constexpr int kTileRows = 64;

struct RowTile {
  int32_t factor;  // index of the tile's adapter; -1 if the tokens have none
  int32_t rank;    // rank of the tile's adapter, before padding
  float scaling;
};

struct RowTable {
  const int32_t* rows = nullptr;   // [tiles][kTileRows]: row of the matrix for each row of each tile, or -1
  const RowTile* tiles = nullptr;  // one RowTile for each tile; null: there is no table
};

}  // namespace peft_ext
