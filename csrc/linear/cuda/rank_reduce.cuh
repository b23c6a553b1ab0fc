// rank_reduce_kernel is the second kernel of a rank pass. rank_reduce_kernel adds the partial sums of the chunks in
// order, scales the sums, and writes the results as RankReduce (rank_reduction.cuh) describes.
#pragma once

#include "linear/cuda/rank_reduction.cuh"

namespace peft_ext {

// Grid: x has ceil(padded_rows · padded_rank / 2 / kReduceThreads) thread blocks for the largest reduction, with
// table_rows instead of padded_rows if there is a table; y is the index of the reduction. A thread of
// rank_reduce_kernel adds the partial sums of two adjacent ranks of a row.
static __global__ void __launch_bounds__(kReduceThreads) rank_reduce_kernel(RankReduces reduces) {
  PEFT_EXT_KERNEL;
  const RankReduce& work = reduces.work[blockIdx.y];
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  const int64_t pairs = work.padded_rank / 2, row = pair / pairs, r = pair % pairs * 2;
  int64_t to = row, rank = work.rank;
  float after = work.after;
  bool made = row < work.rows;  // whether the pass has written partial sums for this row
  if (work.table.tiles != nullptr) {
    if (row >= work.table_rows) return;
    const RowTile tile = work.table.tiles[row / kTileRows];
    to = work.table.rows[row];
    rank = tile.rank;
    after = tile.scaling;
    made = to >= 0 && row < work.padded_rows;
  } else if (row >= work.padded_rows) {
    return;
  }
  float2 sum = make_float2(0.0f, 0.0f);
  if (made) {
    const float2* from = reinterpret_cast<const float2*>(work.partial) + pair;
#pragma unroll 8
    for (int64_t chunk = 0; chunk < work.chunks; ++chunk) {
      const float2 part = from[chunk * work.padded_rows * pairs];
      sum.x += part.x;
      sum.y += part.y;
    }
    const float scale = work.scale * (work.row_scale == nullptr ? 1.0f : work.row_scale[row]);
    sum.x *= scale;
    sum.y *= scale;
  }
  const bool kept = to >= 0 && to < work.rows;
  float values[2] = {sum.x, sum.y};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const bool there = made && r + e < rank;
    if (kept && r + e < work.rank && work.plain != nullptr)
      work.plain[to * work.plain_stride + r + e] = there ? values[e] : 0.0f;
    values[e] = there ? values[e] * after * (work.rank_scale == nullptr ? 1.0f : work.rank_scale[r + e]) : 0.0f;
    if (there && work.out != nullptr)
      store_value(work.out, work.type, row * work.row_stride + (r + e) * work.rank_stride, values[e]);
  }
  if (row >= work.padded_rows) return;
  if (work.terms.data != nullptr) save_terms(work.terms, row, r, values[0], values[1]);
  if (work.transposed.data != nullptr) save_terms_across(work.transposed, r, row, values[0], values[1]);
}

}  // namespace peft_ext
