// Divides a rank pass over a matrix D, which computes P or Q or both (rank_pass.cuh), into thread blocks. The division
// depends only on the shape of D and on which results the pass computes, so that the sums have the same order on every
// model of GPU. This file contains only host code, which calls no CUDA function.
#pragma once

#include <algorithm>

#include "linear/cuda/rank_pass.cuh"

namespace peft_ext {

// If D has fewer than kMaxRankColumns columns, the offsets of a thread block's rows in bytes fit in 32 bits: the
// largest offset, 240 rows of float32, is below 3.75 GiB.
constexpr int64_t kMaxRankColumns = int64_t{1} << 22;

// Target number of thread blocks of a rank pass: several waves on a small GPU, one or two waves on a large GPU. More
// thread blocks than this target would only write more partial sums. A pass that computes both P and Q writes more
// partial sums per block, and so has fewer blocks.
constexpr int64_t kRankBlocksWanted = 768;
constexpr int64_t kRankBlocksOfBoth = 384;

// Smallest number of tiles that a thread block reads in a pass that computes only P or only Q, if D has that many
// tiles; the last thread block of a row or column of blocks may read fewer. With two tiles, the block can load one tile
// while multiplying the other tile.
constexpr int64_t kRankTilesAtLeast = 2;

struct RankPlan {
  int64_t row_tiles, column_tiles;    // numbers of tiles of D per thread block
  int64_t row_chunks, column_chunks;  // numbers of thread blocks in the grid along the rows and along the columns of D
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
  // For P, a thread block has one tile of rows and reads several tiles of columns. For Q, a thread block has one tile
  // of columns and reads several tiles of rows.
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
