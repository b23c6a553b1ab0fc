// Makes the tables of row_runs.cuh on the device, from the ends of the experts' rows, in one launch of one thread
// block. The thread block computes running sums over the experts, and finds the expert of each tile and of each chunk
// by a binary search in these sums.
#pragma once

#include "cuda/vector.cuh"
#include "linear/cuda/row_runs.cuh"

namespace peft_ext {

// Arguments of row_runs_kernel. An end below the previous end counts as the previous end; an end above the number of
// rows counts as the number of rows.
struct RunTables {
  const int64_t* ends;  // [experts]
  int64_t experts, rows;
  int32_t* first_row;    // [experts + 2]: first row of each expert, first row after all experts, number of rows
  int32_t* first_tile;   // [experts + 2]: first tile of each expert, first tile after all experts, number of tiles
  int32_t* first_chunk;  // [experts + 1]: first chunk of each expert, and the number of chunks
  RowRun* tiles;         // [tile_room]
  RowRun* chunks;        // [chunk_room]
  int64_t tile_room, chunk_room;
};

constexpr int kRunThreads = 512;

// Returns the sum, or the maximum if kSum is false, of the values of the threads from thread 0 to this thread. All
// threads of the block must call running().
template <bool kSum>
__device__ __forceinline__ int32_t running(int32_t value, int32_t (&shared)[kRunThreads]) {
  sync_threads();
  shared[threadIdx.x] = value;
  for (int step = 1; step < kRunThreads; step *= 2) {
    sync_threads();
    const int32_t other = static_cast<int>(threadIdx.x) >= step ? shared[threadIdx.x - step] : 0;
    sync_threads();
    shared[threadIdx.x] = kSum                          ? shared[threadIdx.x] + other
                          : other > shared[threadIdx.x] ? other
                                                        : shared[threadIdx.x];
  }
  sync_threads();
  return shared[threadIdx.x];
}

// Returns the RowRun with index i, which has up to kEach rows. first [experts + 1]: the index of each expert's first
// run, and at last the number of all runs.
template <int kEach>
__device__ __forceinline__ RowRun run_of(const RunTables& work, const int32_t* first, int64_t experts, int32_t i) {
  if (i >= first[experts]) return RowRun{0, 0, 0, -1, 0};
  int64_t low = 0, high = experts;  // in each round, first[low] <= i < first[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first[middle] <= i ? low : high) = middle;
  }
  const int32_t before = (i - first[low]) * kEach, begin = work.first_row[low] + before;
  const int32_t left = work.first_row[low + 1] - begin;
  return RowRun{begin, left < kEach ? left : kEach, work.first_tile[low] + before / kTileRows,
                low < work.experts ? static_cast<int32_t>(low) : -1, before};
}

// Grid: one block.
static __global__ void __launch_bounds__(kRunThreads) row_runs_kernel(RunTables work) {
  PEFT_EXT_KERNEL;
  PEFT_EXT_SHARED(int32_t[kRunThreads], shared);
  int32_t row = 0, tiles = 0, chunks = 0;
  for (int64_t base = 0; base <= work.experts; base += kRunThreads) {
    const int64_t e = base + threadIdx.x;
    const int64_t asked = e < work.experts ? work.ends[e] : work.rows;
    const auto own_end = static_cast<int32_t>(asked < 0 ? 0 : min_of(asked, work.rows));
    // The running maximum makes the ends ascending. `row` holds the largest end of the previous rounds.
    running<false>(own_end > row ? own_end : row, shared);
    const int32_t end = shared[threadIdx.x], begin = threadIdx.x == 0 ? row : shared[threadIdx.x - 1];
    const int32_t last_end = shared[kRunThreads - 1], rows = end - begin;
    const int32_t own_tiles = (rows + kTileRows - 1) / kTileRows;
    const int32_t own_chunks = e < work.experts ? (rows + kChunkRows - 1) / kChunkRows : 0;
    const int32_t tiles_to = running<true>(own_tiles, shared), all_tiles = shared[kRunThreads - 1];
    const int32_t chunks_to = running<true>(own_chunks, shared), all_chunks = shared[kRunThreads - 1];
    if (e <= work.experts) {
      work.first_row[e] = begin;
      work.first_tile[e] = tiles + tiles_to - own_tiles;
      work.first_chunk[e] = chunks + chunks_to - own_chunks;
    }
    if (e == work.experts) {
      work.first_row[e + 1] = end;
      work.first_tile[e + 1] = tiles + tiles_to;
    }
    row = last_end;
    tiles += all_tiles;
    chunks += all_chunks;
  }
  sync_threads();
  for (int64_t i = threadIdx.x; i < work.tile_room; i += kRunThreads)
    work.tiles[i] = run_of<kTileRows>(work, work.first_tile, work.experts + 1, static_cast<int32_t>(i));
  for (int64_t i = threadIdx.x; i < work.chunk_room; i += kRunThreads)
    work.chunks[i] = run_of<kChunkRows>(work, work.first_chunk, work.experts, static_cast<int32_t>(i));
}

}  // namespace peft_ext
