// Declares the arguments of rank_reduce_kernel, which adds the partial sums of a rank pass, see rank_reduce.cuh.
#pragma once

#include "linear/cuda/row_tiles.cuh"
#include "linear/cuda/terms.cuh"

namespace peft_ext {

// A RankReduce describes how the partial sums of a product P or Q of a rank pass (rank_pass.cuh) are added. The results
// are value[row][r] = scale · row_scale[row] · Σ_chunks partial. In `terms`, `transposed` and `out` the values are also
// multiplied by after · rank_scale[r]. Each of the outputs plain, terms, transposed and out may be null. If there is a
// table, `row` is a row of the table, and each tile has its own rank and its own scaling, which is used in place of
// `after`. Tiles of tokens without an adapter have no partial sums, and the values of these tiles are zero.
struct RankReduce {
  const float* partial;
  int64_t chunks, rows, padded_rows;
  int64_t rank, padded_rank;
  RowTable table;      // table of a mixed batch's rows; if table.tiles is null, rows are in order
  int64_t table_rows;  // number of rows of all tiles, at least padded_rows
  float scale;
  const float* row_scale;   // factors of the rows; null: all factors are 1
  const float* rank_scale;  // factors of the ranks; null: all factors are 1
  float after;              // factor of the results in terms, transposed and out
  float* plain;             // values [rows][plain_stride], not multiplied by after · rank_scale
  int64_t plain_stride;
  TermsOut terms;       // bfloat16 terms [padded rows, padded rank] of the values multiplied by after · rank_scale
  TermsOut transposed;  // bfloat16 terms [padded rank, padded rows] of the values multiplied by after · rank_scale
  // `out` receives the values multiplied by after · rank_scale, in dtype `type`, with the strides row_stride and
  // rank_stride.
  void* out;
  DType type;
  int64_t row_stride, rank_stride;
};

// The arguments of one launch of rank_reduce_kernel: the reductions of P and of Q of a pass, or of the passes of
// several layers.
constexpr int kMostReduces = 16;
struct RankReduces {
  RankReduce work[kMostReduces];
};

constexpr int kReduceThreads = 256;

}  // namespace peft_ext
