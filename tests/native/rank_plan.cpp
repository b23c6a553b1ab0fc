// Divides every grid of up to 300 x 300 tiles and some large grids as a rank pass does. Tests that each tile is in one
// block, that no block is empty, and that the number of blocks is at most the wanted number or is the number that one
// direction alone needs. Prints errors and the number of plans.
#include <stdio.h>

#include "linear/cuda/rank_plan.cuh"

using namespace peft_ext;

namespace {

bool covers(int64_t tiles, int64_t each, int64_t chunks) {
  return each >= 1 && chunks >= 1 && each * chunks >= tiles && each * (chunks - 1) < tiles;
}

bool check(RankWork work, int64_t rows, int64_t columns) {
  const RankPlan plan = plan_rank_pass(work, rows, columns);
  bool right = covers(rows, plan.row_tiles, plan.row_chunks) && covers(columns, plan.column_tiles, plan.column_chunks);
  const bool both = work == RankWork::kBoth || work == RankWork::kBothAndDots;
  const int64_t across = work == RankWork::kColumns ? columns : both ? (rows + 3) / 4 : rows;
  // A plan has at most the wanted number of blocks, except where one direction alone needs more blocks.
  const int64_t blocks = plan.row_chunks * plan.column_chunks;
  right = right && (blocks <= (both ? kRankBlocksOfBoth : kRankBlocksWanted) || blocks == across);
  right = right && (work != RankWork::kColumns || plan.column_tiles == 1) && (!both || plan.row_tiles == 4);
  right = right && (both || work == RankWork::kColumns || plan.row_tiles == 1);
  if (!right)
    printf("work %d, %ld x %ld tiles: %ld x %ld of %ld x %ld\n", static_cast<int>(work), rows, columns, plan.row_chunks,
           plan.column_chunks, plan.row_tiles, plan.column_tiles);
  return right;
}

}  // namespace

int main() {
  int64_t plans = 0;
  bool right = true;
  const auto all = [&](int64_t rows, int64_t columns) {
    for (const RankWork work : {RankWork::kRows, RankWork::kRowsAndSquares, RankWork::kColumns, RankWork::kBoth,
                                RankWork::kBothAndDots, RankWork::kGroupedRows}) {
      right = check(work, rows, columns) && right;
      ++plans;
    }
  };
  for (int64_t rows = 1; rows <= 300; ++rows)
    for (int64_t columns = 1; columns <= 300; ++columns) all(rows, columns);
  for (int64_t rows = 1; rows <= 1 << 20; rows = rows * 3 + 1)
    for (int64_t columns = 1; columns <= 1 << 16; columns = columns * 2 + 1) all(rows, columns);
  printf("%ld plans\n", plans);
  return right ? 0 : 1;
}
