// Divides a rank pass into blocks. The division depends only on the shape, so that all cards compute equal sums. Host
// code, pure arithmetic.
#pragma once

#include <algorithm>

#include "linear/cuda/rank_pass.cuh"

namespace peft_ext {

// From this number of columns on a tile's bytes would overflow 32 bits: 240 rows of float32 are 4 GiB.
constexpr int64_t kMaxRankColumns = int64_t{1} << 22;

// Wanted number of blocks: some waves on a small card, one or two on a large card. More blocks would only write more
// partial sums. A pass that computes P and Q writes more of them, and so has fewer blocks.
constexpr int64_t kRankBlocksWanted = 768;
constexpr int64_t kRankBlocksOfBoth = 384;

// Smallest number of tiles of a block along its direction: the number of tiles that are loaded ahead.
constexpr int64_t kRankTilesAtLeast = 2;

struct RankPlan {
  int64_t row_tiles, column_tiles;    // tiles per block
  int64_t row_chunks, column_chunks;  // size of the grid
};

inline RankPlan plan_rank_pass(RankWork work, int64_t row_tiles, int64_t column_tiles) {
  const auto divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  RankPlan plan{1, 1, row_tiles, column_tiles};
  if (work == RankWork::kBoth || work == RankWork::kBothAndDots) {
    plan.row_tiles = kRankTilesOfBoth;
    plan.row_chunks = divide(row_tiles, plan.row_tiles);
    plan.column_tiles = divide(column_tiles, std::clamp(kRankBlocksOfBoth / plan.row_chunks, int64_t{1}, column_tiles));
    plan.column_chunks = divide(column_tiles, plan.column_tiles);
    return plan;
  }
  // A block goes along the columns for P, and down the rows for Q.
  const bool along = work != RankWork::kColumns;
  const int64_t across = along ? row_tiles : column_tiles, tiles = along ? column_tiles : row_tiles;
  const int64_t chunks =
      std::clamp(kRankBlocksWanted / across, int64_t{1}, divide(tiles, std::min(tiles, kRankTilesAtLeast)));
  const int64_t each = divide(tiles, chunks);
  (along ? plan.column_tiles : plan.row_tiles) = each;
  (along ? plan.column_chunks : plan.row_chunks) = divide(tiles, each);
  return plan;
}

}  // namespace peft_ext
