// Defines kernels for elementwise passes over activations, and for sums of products over tokens.
//
//   column_pass:   out = m ∘ (scale + shift);  sums[c] = Σ_t m[t, c] other[t, c]      (l ∘ x and dl; g ∘ dY and dg).
//   finish:        y = g ∘ (z + b₀) + b₁                                              (outputs of DoRA and IA3).
//   scale_rows:    out[n] = g[n] w[n] for each row n                                  (an output scale, applied to W).
//   drop:          out = (add or 0) + mask/(1-p) ∘ x.
//
// A thread computes eight columns of a row at a time, which are 16 bytes of a 16-bit dtype. Arithmetic is float32, and
// each result is rounded once. A thread block of column_pass or finish computes 256 columns of a chunk of kColumnRows
// rows. A warp of the block computes every eighth row of the chunk, so that a thread reads the factors of its eight
// columns only once. For the sums, column_reduce_kernel adds the partial sums [chunks][columns] in order. column_pass
// uses 8 KiB of shared memory, in which the sums of the warps are added. Each kernel of this file reads or writes each
// large matrix once.
#pragma once

#include "cuda/vector.cuh"

namespace peft_ext {

constexpr int kColumnThreads = 256;
constexpr int kColumnWarps = kColumnThreads / kWarpSize;
constexpr int kColumnTile = kWarpSize * kVector;
constexpr int64_t kColumnRows = 128;  // number of rows of the matrix that a thread block processes

struct ColumnWork {
  const void* m;
  const void* other;   // matrix that m is multiplied with in the sums; null: no sums
  const float* scale;  // factors of the columns [columns]; null if out is null
  float shift;
  void* out;    // receives m ∘ (scale + shift); null: no output
  float* sums;  // receives partial sums [row chunks][columns]
  int64_t rows, columns;
  bool whole;  // whether `columns` is a multiple of 8 and m and `other` are aligned to 16 bytes
};

using ColumnSumsShared = float[kColumnWarps][kColumnTile];

// Adds the column sums of the warps of a thread block, and writes the totals to `out`, as the block's partial sums. All
// threads of the block must call save_column_sums.
__device__ __forceinline__ void save_column_sums(const float (&sums)[kVector], int64_t columns, float* out,
                                                 ColumnSumsShared& shared) {
#pragma unroll
  for (int i = 0; i < kVector; ++i)  // adjacent lanes write adjacent words, without bank conflicts
    shared[threadIdx.x / kWarpSize][i * kWarpSize + threadIdx.x % kWarpSize] = sums[i];
  sync_threads();
  const int mine = threadIdx.x;  // number of a column within the thread block's tile
  const int64_t to = static_cast<int64_t>(blockIdx.y) * kColumnTile + mine;
  if (to < columns) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kColumnWarps; ++w) sum += shared[w][mine % kVector * kWarpSize + mine / kVector];
    out[blockIdx.x * columns + to] = sum;
  }
}

// Grid: x has a thread block for each chunk of kColumnRows rows; y has one for each tile of kColumnTile columns.
template <typename T>
__global__ void __launch_bounds__(kColumnThreads) column_pass_kernel(ColumnWork work) {
  PEFT_EXT_KERNEL;
  PEFT_EXT_SHARED(ColumnSumsShared, shared);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kColumnTile + lane * kVector;
  const int64_t begin = blockIdx.x * kColumnRows, end = min_of(begin + kColumnRows, work.rows);
  float sums[kVector] = {}, scale[kVector] = {};
  if (column < work.columns) {
    if (work.out != nullptr) {
      load_columns(work.scale, column, work.columns, false, scale);
#pragma unroll
      for (int i = 0; i < kVector; ++i) scale[i] += work.shift;
    }
    for (int64_t row = begin + warp; row < end; row += kColumnWarps) {
      float m[kVector], other[kVector], out[kVector];
      load_columns(static_cast<const T*>(work.m) + row * work.columns, column, work.columns, work.whole, m);
      if (work.other != nullptr) {
        load_columns(static_cast<const T*>(work.other) + row * work.columns, column, work.columns, work.whole, other);
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums[i] += m[i] * other[i];
      }
      if (work.out != nullptr) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) out[i] = m[i] * scale[i];
        save_columns(static_cast<T*>(work.out) + row * work.columns, column, work.columns, work.whole, out);
      }
    }
  }
  if (work.other == nullptr) return;
  save_column_sums(sums, work.columns, work.sums, shared);
}

struct Finish {
  const void* z;
  const float* scale;       // g [columns]
  const void* bias_before;  // bias b₀ [columns] of type T, or null
  const void* bias_after;   // bias b₁ [columns] of type T, or null
  void* out;
  int64_t rows, columns;
  bool whole;
};

// Grid: x has a thread block for each chunk of kColumnRows rows; y has one for each tile of kColumnTile columns.
template <typename T>
__global__ void __launch_bounds__(kColumnThreads) finish_kernel(Finish work) {
  PEFT_EXT_KERNEL;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kColumnTile + threadIdx.x % kWarpSize * kVector;
  if (column >= work.columns) return;
  const int64_t begin = blockIdx.x * kColumnRows, end = min_of(begin + kColumnRows, work.rows);
  float scale[kVector], before[kVector] = {}, after[kVector] = {};
  load_columns(work.scale, column, work.columns, false, scale);
  if (work.bias_before != nullptr)
    load_columns(static_cast<const T*>(work.bias_before), column, work.columns, false, before);
  if (work.bias_after != nullptr)
    load_columns(static_cast<const T*>(work.bias_after), column, work.columns, false, after);
  for (int64_t row = begin + threadIdx.x / kWarpSize; row < end; row += kColumnWarps) {
    const int64_t at = row * work.columns;
    float z[kVector];
    load_columns(static_cast<const T*>(work.z) + at, column, work.columns, work.whole, z);
#pragma unroll
    for (int i = 0; i < kVector; ++i) z[i] = scale[i] * (z[i] + before[i]) + after[i];
    save_columns(static_cast<T*>(work.out) + at, column, work.columns, work.whole, z);
  }
}

// scale_rows: out[n] = g[n] w[n] for all rows n. Grid: x has a thread block for each kColumnThreads · 8 columns; y has
// one for each row.
template <typename T>
__global__ void __launch_bounds__(kColumnThreads)
    scale_rows_kernel(const T* w, const float* scale, T* out, int64_t columns) {
  PEFT_EXT_KERNEL;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x) * kVector;
  if (column >= columns) return;
  const int64_t at = blockIdx.y * columns + column;
  const float g = scale[blockIdx.y];
  float values[kVector];
  load_vector(w + at, values);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] *= g;
  save_vector(out + at, values);
}

struct Drop {
  const void* x;
  const void* add;  // array [numel] of type T that is added to mask/(1-p) ∘ x, or null
  void* out;
  int64_t numel;
  bool whole;  // whether x, add and out are aligned to 16 bytes
  DeviceDropout dropout;
};

// Grid: ceil(numel / kVector / kColumnThreads) thread blocks. A thread computes eight elements, whose random draws are
// one block of Philox.
template <typename T>
__global__ void __launch_bounds__(kColumnThreads) drop_kernel(Drop work) {
  PEFT_EXT_KERNEL;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x) * kVector;
  if (first >= work.numel) return;
  const bool whole = work.whole && first + kVector <= work.numel;
  float x[kVector], add[kVector] = {};
  load_columns(static_cast<const T*>(work.x), first, work.numel, whole, x);
  if (work.add != nullptr) load_columns(static_cast<const T*>(work.add), first, work.numel, whole, add);
  const uint32_t kept = kept_of_group(load_philox(work.dropout), first / kPhiloxGroup);
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = add[i] + ((kept >> i) & 1u ? x[i] * work.dropout.scale : 0.0f);
  save_columns(static_cast<T*>(work.out), first, work.numel, whole, x);
}

}  // namespace peft_ext
