// Kernels that run between the passes over the rows of a mixture of experts: the kernels split each expert's small
// matrices (A, B, S, P) into bfloat16 terms, and add the partial sums of the passes.
#pragma once

#include "linear/cuda/row_runs.cuh"
#include "linear/cuda/terms.cuh"

namespace peft_ext {

// Splits each expert's matrix [outer, inner], in a stack with any strides, into bfloat16 terms. All terms of an
// expert's matrix are stored before the terms of the next expert's matrix. No terms are written for experts without
// rows.
struct StackSplit {
  const void* in;
  DType type;
  int64_t outer, inner, by_expert, outer_stride, inner_stride;
  const float* inner_scale;  // factors [experts, inner]; a null pointer stands for ones
  TermsOut out;              // where the terms of expert 0 are written
  int64_t out_stride;        // distance to the next expert's terms, in words of 4 bytes
};

constexpr int kMaxStackSplits = 2;
struct StackSplits {
  StackSplit work[kMaxStackSplits];
  const int64_t* ends;  // ends of the experts' rows of x, see has_rows
};

// Returns whether an expert has rows of x, by the ends of the experts' rows. If `ends` is null, the result is true.
__device__ __forceinline__ bool has_rows(const int64_t* ends, int64_t expert) {
  return ends == nullptr || ends[expert] > (expert == 0 ? 0 : ends[expert - 1]);
}

// Splits up to kMaxStackSplits stacks. Grid: x as in split_kernel (linear/cuda/split.cuh); y has a block for each
// expert; z has a block for each stack.
static __global__ void __launch_bounds__(kSplitThreads) split_stacks_kernel(StackSplits splits) {
  PEFT_EXT_KERNEL;
  const StackSplit& work = splits.work[blockIdx.z];
  const int64_t expert = blockIdx.y;
  if (!has_rows(splits.ends, expert)) return;
  Split own{};
  own.in = static_cast<const unsigned char*>(work.in) + expert * work.by_expert * (work.type == DType::kF32 ? 4 : 2);
  own.type = work.type;
  own.outer = work.outer;
  own.inner = work.inner;
  own.outer_stride = work.outer_stride;
  own.inner_stride = work.inner_stride;
  if (work.inner_scale != nullptr) own.inner_scale = work.inner_scale + expert * work.inner;
  own.out = work.out;
  own.out.data += expert * work.out_stride;
  split_pair_of(own, static_cast<int64_t>(blockIdx.x) * kSplitThreads + threadIdx.x);
}

// Computes S or P, a matrix with a column for each rank, from a rank pass's partial sums (value[row][r] = scale ·
// Σ_chunks partial[row in the tiles][r]) or from `given` (value[row][r] = scale · given[row][r]), and the bfloat16
// terms of S or P.
struct RunRows {
  const float* partial;  // partial sums [chunks][padded rows][padded rank]; null if `given` is used
  const float* given;    // values [rows][rank]; used if `partial` is null
  int64_t chunks, padded_rows, rank, padded_rank;
  const RowRun* tiles;
  float scale;
  float after;          // additional factor of the value in `terms` and `transposed`, but not in `plain`
  float* plain;         // receives the value [rows][rank], 0 in rows that belong to no expert; may be null
  TermsOut terms;       // receives the terms of the value, [padded rows, padded rank]
  TermsOut transposed;  // receives the terms of the transposed value, [padded rank, padded rows]
};

constexpr int kStackThreads = 256;

// Grid: ceil(padded_rows · padded_rank / 2 / kStackThreads) blocks. A thread computes two adjacent ranks.
static __global__ void __launch_bounds__(kStackThreads) run_rows_kernel(RunRows work) {
  PEFT_EXT_KERNEL;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kStackThreads + threadIdx.x;
  const int64_t pairs = work.padded_rank / 2, padded_row = pair / pairs, r = pair % pairs * 2;
  if (padded_row >= work.padded_rows) return;
  const RowRun run = work.tiles[padded_row / kTileRows];
  if (run.rows == 0) return;
  const int64_t within = padded_row % kTileRows, row = run.first + within;
  float values[2] = {0.0f, 0.0f};
  if (within < run.rows && run.expert >= 0) {
    if (work.partial != nullptr) {
      const float2* from = reinterpret_cast<const float2*>(work.partial) + pair;
#pragma unroll 4
      for (int64_t chunk = 0; chunk < work.chunks; ++chunk) {
        const float2 part = from[chunk * work.padded_rows * pairs];
        values[0] += part.x;
        values[1] += part.y;
      }
    } else {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (r + e < work.rank) values[e] = work.given[row * work.rank + r + e];
    }
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    values[e] *= work.scale;
    if (within < run.rows && r + e < work.rank && work.plain != nullptr)
      work.plain[row * work.rank + r + e] = values[e];
    values[e] = r + e < work.rank ? values[e] * work.after : 0.0f;
  }
  if (run.expert < 0) return;
  if (work.terms.data != nullptr) save_terms(work.terms, padded_row, r, values[0], values[1]);
  if (work.transposed.data != nullptr) save_terms_across(work.transposed, r, padded_row, values[0], values[1]);
}

// Computes the gradient of each expert's A or B from the partial sums of a rank pass: out[e][column][r] = scale ·
// column_scale[e][column] · Σ_chunks of e partial[chunk][column][r].
struct StackReduce {
  const float* partial;        // partial sums [chunks][padded columns][padded rank]
  const int32_t* first_chunk;  // index of each expert's first chunk, see RunTables
  int64_t columns, padded_columns, rank, padded_rank;
  float scale;
  const float* column_scale;  // factors [experts, columns]; a null pointer stands for ones
  void* out;
  DType type;
  int64_t by_expert, by_column, by_rank;
};

struct StackReduces {
  StackReduce work[2];
};

// Grid: x has ceil(columns · padded_rank / 2 / kStackThreads) blocks, where `columns` is the larger of the stacks'
// numbers of columns; y has a block for each expert; z has a block for each stack. A thread computes two adjacent
// ranks.
static __global__ void __launch_bounds__(kStackThreads) stack_reduce_kernel(StackReduces reduces) {
  PEFT_EXT_KERNEL;
  const StackReduce& work = reduces.work[blockIdx.z];
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kStackThreads + threadIdx.x;
  const int64_t pairs = work.padded_rank / 2, column = pair / pairs, r = pair % pairs * 2, expert = blockIdx.y;
  if (column >= work.columns) return;
  float sums[2] = {0.0f, 0.0f};
  for (int32_t chunk = work.first_chunk[expert]; chunk < work.first_chunk[expert + 1]; ++chunk) {
    const float2 part = reinterpret_cast<const float2*>(work.partial)[chunk * work.padded_columns * pairs + pair];
    sums[0] += part.x;
    sums[1] += part.y;
  }
  float scale = work.scale;
  // column_scale is not read for an expert without rows, whose gradient is 0 even if column_scale is not finite.
  if (work.column_scale != nullptr && work.first_chunk[expert] != work.first_chunk[expert + 1])
    scale *= work.column_scale[expert * work.columns + column];
#pragma unroll
  for (int e = 0; e < 2; ++e)
    if (r + e < work.rank)
      store_value(work.out, work.type, expert * work.by_expert + column * work.by_column + (r + e) * work.by_rank,
                  scale * sums[e]);
}

}  // namespace peft_ext
