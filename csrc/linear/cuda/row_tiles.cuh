// The rows of a mixed batch, which has an adapter for each sample, in tiles of 64 rows of one adapter.
//
// An adapter's tokens, wherever in the batch they are, fill ceil(T_g / 64) tiles: row j of tile i is token
// rows[64 i + j], or none (-1) behind the adapter's last. Tokens without an adapter have the last tiles. The passes
// over activations (rank_pass.cuh, expand.cuh) find their rows by this table and a tile's factor where RowTile says:
// they do the work of at most T / 64 + G tiles of one adapter's ranks, in whatever order the samples are, and what one
// adapter holds never meets another's tokens.
#pragma once

#include "cuda/ptx.cuh"

namespace peft_ext {

constexpr int kTileRows = 64;

struct RowTile {
  int32_t factor;  // which of the factors; -1: none
  int32_t rank;    // its own, of those that it is padded to
  float scaling;
};

struct RowTable {
  const int32_t* rows = nullptr;   // [tiles][kTileRows]
  const RowTile* tiles = nullptr;  // null: rows are in order, and all have one factor
};

}  // namespace peft_ext
