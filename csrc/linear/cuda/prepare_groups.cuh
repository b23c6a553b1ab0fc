// Prepares the passes over a mixed batch, in one launch if the batch has at most kPreparedAdapters adapters and
// kPreparedRuns runs of tokens. The launch writes the table of the batch's rows (row_tiles.cuh) and the bfloat16 terms
// of each adapter's A and B (terms.cuh), which are padded to the largest rank and stored one after the other.
//
// The launch's arguments tell which tokens and matrices belong together, so that nothing is copied from the host to
// device memory and a CUDA graph can contain the launch. If the arguments can't hold all adapters or runs of tokens,
// there are more launches. Bytes moved: the A and B of all adapters once, their terms once, and about 4 T bytes for the
// table, where T is the number of tokens.
#pragma once

#include "linear/cuda/row_tiles.cuh"
#include "linear/cuda/terms.cuh"

namespace peft_ext {

struct AdapterFactors {
  const void* lora_A;  // [rank, inputs]
  const void* lora_B;  // [outputs, rank]
  DType type_A, type_B;
  int32_t rank;
};

// A run of tokens that have the same adapter, or that all have none. The tokens of a run are adjacent both in the batch
// and in the table.
struct TokenRun {
  int32_t first, count;  // first token of the run, and number of its tokens
  int32_t place;         // first row of the run in the table
  // Number of table rows to fill from `place` on: `count`, or, for the last run of an adapter or of the tokens without
  // an adapter, all rows up to the end of the last tile.
  int32_t filled;
  RowTile tile;
};

constexpr int kPreparedAdapters = 48;
constexpr int kPreparedRuns = 64;

struct PrepareGroups {
  int64_t inputs, outputs;
  TermsOut lora_A, lora_B;     // memory for the terms of A and of B of the launch's first adapter
  int64_t stride_A, stride_B;  // distance from one adapter's bfloat16 terms to the next one's, in words of 4 bytes
  int32_t* rows;               // receives RowTable::rows
  RowTile* tiles;
  int adapters, runs;  // numbers of adapters and of runs in this launch
  AdapterFactors factors[kPreparedAdapters];
  TokenRun run[kPreparedRuns];
};
static_assert(sizeof(PrepareGroups) <= 4096, "a launch's arguments");

// Grid: x has as many thread blocks as in split_kernel; y has an index for each A, then one for each B, and a last
// index for the table if the launch has runs.
static __global__ void __launch_bounds__(kSplitThreads) prepare_groups_kernel(PrepareGroups work) {
  PEFT_EXT_KERNEL;
  const int which = static_cast<int>(blockIdx.y);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kSplitThreads + threadIdx.x;
  if (which < 2 * work.adapters) {
    const bool second = which >= work.adapters;
    const int index = second ? which - work.adapters : which;
    const AdapterFactors& factors = work.factors[index];
    Split split{};
    split.in = second ? factors.lora_B : factors.lora_A;
    split.type = second ? factors.type_B : factors.type_A;
    split.outer = second ? work.outputs : factors.rank;
    split.inner = second ? factors.rank : work.inputs;
    split.outer_stride = split.inner;
    split.inner_stride = 1;
    split.out = second ? work.lora_B : work.lora_A;
    split.out.data += index * (second ? work.stride_B : work.stride_A);
    return split_pair_of(split, at);
  }
  for (int r = 0; r < work.runs; ++r) {
    const TokenRun& run = work.run[r];
    for (int64_t i = at; i < run.filled; i += static_cast<int64_t>(gridDim.x) * kSplitThreads) {
      const int64_t place = run.place + i;
      work.rows[place] = i < run.count ? static_cast<int32_t>(run.first + i) : -1;
      if (place % kTileRows == 0) work.tiles[place / kTileRows] = run.tile;
    }
  }
}

}  // namespace peft_ext
