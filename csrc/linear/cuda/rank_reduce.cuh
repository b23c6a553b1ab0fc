// The second half of a rank pass: the partial sums of its chunks, added in order, and what is made of them.
#pragma once

#include "linear/cuda/terms.cuh"

namespace peft_ext {

// What becomes of partial sums: value[row][r] = scale · row_scale[row] · Σ_chunks partial, and times rank_scale[r]
// where that is said. Each output may be null.
struct RankReduce {
  const float* partial;
  int64_t chunks, rows, padded_rows;
  int64_t rank, padded_rank;
  float scale;
  const float* row_scale;   // null: 1
  const float* rank_scale;  // null: 1
  float after;              // one more factor, with rank_scale
  float* plain;             // [rows][rank], without rank_scale
  TermsOut terms;           // [padded rows, padded rank], with it
  TermsOut transposed;      // [padded rank, padded rows], with it
  void* out;                // with it, of these type and strides
  DType type;
  int64_t row_stride, rank_stride;
};

// Of one pass: P's and Q's.
struct RankReduces {
  RankReduce work[2];
};

constexpr int kReduceThreads = 256;

// Grid: x: ceil(padded_rows · padded_rank / 2 / kReduceThreads) of the larger; y: which. A thread makes two
// neighbouring ranks.
static __global__ void __launch_bounds__(kReduceThreads) rank_reduce_kernel(RankReduces reduces) {
  const RankReduce& work = reduces.work[blockIdx.y];
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  const int64_t pairs = work.padded_rank / 2, row = pair / pairs, r = pair % pairs * 2;
  if (row >= work.padded_rows) return;
  float2 sum = make_float2(0.0f, 0.0f);
  if (row < work.rows) {
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
  float values[2] = {sum.x, sum.y};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const bool there = row < work.rows && r + e < work.rank;
    if (there && work.plain != nullptr) work.plain[row * work.rank + r + e] = values[e];
    values[e] = there ? values[e] * work.after * (work.rank_scale == nullptr ? 1.0f : work.rank_scale[r + e]) : 0.0f;
    if (there && work.out != nullptr)
      store_value(work.out, work.type, row * work.row_stride + (r + e) * work.rank_stride, values[e]);
  }
  if (work.terms.data != nullptr) save_terms(work.terms, row, r, values[0], values[1]);
  if (work.transposed.data != nullptr) save_terms_across(work.transposed, r, row, values[0], values[1]);
}

}  // namespace peft_ext
