// How a rank pass is cut into blocks: from the shape alone, so that the same sums are made in the same order on every
// card. Host code, pure arithmetic.
#pragma once

#include <algorithm>

#include "linear/cuda/rank_pass.cuh"

namespace peft_ext {

// D's columns from which on a tile's bytes are not counted in 32 bits: 240 rows of float32 are 4 GiB.
constexpr int64_t kMaxRankColumns = int64_t{1} << 22;

// Blocks of a pass that has work for them: some waves of a small card, one or two of a large one. More would only bring
// more partial sums; a pass that makes both kinds has the more of them to write.
constexpr int64_t kRankBlocksWanted = 768;
constexpr int64_t kRankBlocksOfBoth = 384;

// Tiles that a block has at least along the way it goes, where there are: what is on its way at once.
constexpr int64_t kRankTilesAtLeast = 2;

struct RankPlan {
  int64_t row_tiles, column_tiles;    // of a block
  int64_t row_chunks, column_chunks;  // the grid
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
  // Along the columns for P, down the rows for Q.
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
