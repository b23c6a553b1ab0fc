// Passes over activations whose work is per element, or per element and summed over tokens.
//
//   column_pass:   out = m ∘ (scale + shift);  sums[c] = Σ_t m[t, c] other[t, c]      (IA3; dY's g ∘ dY and dg)
//   finish:        y = g ∘ (z + b₀) + b₁                                              (DoRA's and IA3's outputs)
//   drop:          out = (add or 0) + mask/(1-p) ∘ x
//
// A thread moves eight columns at a time, 16 bytes of 16-bit types; float32 arithmetic, one rounding. A block of
// column_pass owns 256 columns and a chunk of rows, a warp every eighth row; partial sums [chunks][columns] are added
// in order by a second kernel. Shared: 8 KiB, where the warps' sums meet. Bytes moved: each matrix once.
#pragma once

#include "common/vector.cuh"
#include "nf4/nf4.cuh"

namespace peft_ext {

constexpr int kColumnThreads = 256;
constexpr int kColumnWarps = kColumnThreads / kWarpSize;
constexpr int kColumnTile = kWarpSize * kVector;
constexpr int64_t kColumnRows = 128;  // of a block

struct ColumnWork {
  const void* m;
  const void* other;   // null: no sums
  const float* scale;  // [columns]; null where out is
  float shift;
  void* out;    // null: not wanted
  float* sums;  // [row chunks][columns]
  int64_t rows, columns;
  bool whole;  // columns is a multiple of 8 and the matrices lie on 16 bytes
};

using ColumnSumsShared = float[kColumnWarps][kColumnTile];

// Grid: x: chunks of kColumnRows rows; y: tiles of kColumnTile columns.
template <typename T>
__global__ void __launch_bounds__(kColumnThreads) column_pass_kernel(ColumnWork work) {
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
#pragma unroll
  for (int i = 0; i < kVector; ++i) shared[warp][i * kWarpSize + lane] = sums[i];  // lanes in a row: no conflicts
  sync_threads();
  const int mine = threadIdx.x;  // which column of the tile
  const int64_t to = static_cast<int64_t>(blockIdx.y) * kColumnTile + mine;
  if (to >= work.columns) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kColumnWarps; ++w) sum += shared[w][mine % kVector * kWarpSize + mine / kVector];
  work.sums[blockIdx.x * work.columns + to] = sum;
}

// sums[c] of all chunks, divided by scale[c] where that is given and not too small: then small_scale_kernel's is the
// result. Grid: ceil(columns / kColumnThreads).
constexpr float kSmallestScale = 1.0f / 64.0f;

__global__ void __launch_bounds__(kColumnThreads)
    column_reduce_kernel(const float* partial, int64_t chunks, int64_t columns, const float* scale, float* out) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x;
  if (column >= columns) return;
  float sum = 0.0f;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * columns + column];
  if (scale != nullptr) {
    if (!(fabsf(scale[column]) >= kSmallestScale)) return;
    sum /= scale[column];
  }
  out[column] = sum;
}

// out[n] = Σ_t dY[t, n] Z[t, n] where |g[n]| is so small that Y = g ∘ Z holds too little of Z:
// Z[t, n] = Σ_k x[t, k] W[n, k] + scaling Σ_r S[t, r] B[n, r] + bias[n], made again. A block per n; most return at
// once.
struct SmallScale {
  const void* grad;     // dY [rows, outputs]
  const void* x;        // [rows, inputs]
  const void* dense;    // W [outputs, inputs], or
  Nf4View nf4;          // W as NF4
  const float* scale;   // g
  const void* bias;     // T, or null
  const float* s;       // [rows, rank], or null
  const float* lora_B;  // [outputs, rank]
  float scaling;
  int64_t rows, outputs, inputs, rank;
  float* out;
};

using BlockSumShared = float[kColumnWarps];

// The sum over a block's threads, at thread 0.
__device__ __forceinline__ float block_sum(float value, BlockSumShared& shared) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  sync_threads();
  float sum = 0.0f;
  if (threadIdx.x == 0)
    for (int w = 0; w < kColumnWarps; ++w) sum += shared[w];
  return sum;
}

// out[r] = scale Σ_n B[n, r] Q[n, r]: the gradient of a rank's scale. Grid: rank.
__global__ void __launch_bounds__(kColumnThreads)
    rank_scale_kernel(const float* lora_B, const float* products, int64_t rows, int64_t rank, float scale, float* out) {
  PEFT_EXT_SHARED(BlockSumShared, shared);
  float sum = 0.0f;
  for (int64_t n = threadIdx.x; n < rows; n += kColumnThreads)
    sum += lora_B[n * rank + blockIdx.x] * products[n * rank + blockIdx.x];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) out[blockIdx.x] = scale * sum;
}

// Element of an NF4 weight, as a T holds it.
template <typename T>
__device__ __forceinline__ float nf4_element(const Nf4View& weight, int64_t element) {
  const uint32_t byte = weight.packed[element / 2];
  const float code = kNf4DeviceCode[element % 2 == 0 ? byte >> 4 : byte & 15u];
  return rounded_to<T>(fmul_rn(code, nf4_scale(weight, element >> weight.log2_blocksize)));
}

// Grid: outputs.
template <typename T>
__global__ void __launch_bounds__(kColumnThreads) small_scale_kernel(SmallScale work) {
  PEFT_EXT_SHARED(BlockSumShared, shared);
  const int64_t n = blockIdx.x;
  if (fabsf(work.scale[n]) >= kSmallestScale) return;
  const T* grad = static_cast<const T*>(work.grad) + n;
  const T* x = static_cast<const T*>(work.x);
  float sum = 0.0f;
  for (int64_t k = threadIdx.x; k < work.inputs; k += kColumnThreads) {
    float gx = 0.0f;
    for (int64_t t = 0; t < work.rows; ++t)
      gx += load_value(grad + t * work.outputs) * load_value(x + t * work.inputs + k);
    const int64_t at = n * work.inputs + k;
    sum += gx *
           (work.dense != nullptr ? load_value(static_cast<const T*>(work.dense) + at) : nf4_element<T>(work.nf4, at));
  }
  const float bias = work.bias == nullptr ? 0.0f : load_value(static_cast<const T*>(work.bias) + n);
  for (int64_t t = threadIdx.x; t < work.rows; t += kColumnThreads) {
    float z = bias;
    for (int64_t r = 0; r < work.rank; ++r)
      z += work.scaling * work.s[t * work.rank + r] * work.lora_B[n * work.rank + r];
    sum += z * load_value(grad + t * work.outputs);
  }
  const float total = block_sum(sum, shared);
  if (threadIdx.x == 0) work.out[n] = total;
}

struct Finish {
  const void* z;
  const float* scale;       // g [columns]
  const void* bias_before;  // b₀, T [columns], or null
  const void* bias_after;   // b₁
  void* out;
  int64_t rows, columns;
  bool whole;
};

// Grid: x: chunks of kColumnWarps rows; y: tiles of kColumnTile columns.
template <typename T>
__global__ void __launch_bounds__(kColumnThreads) finish_kernel(Finish work) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kColumnWarps + threadIdx.x / kWarpSize;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kColumnTile + threadIdx.x % kWarpSize * kVector;
  if (row >= work.rows || column >= work.columns) return;
  const int64_t at = row * work.columns;
  float z[kVector], scale[kVector], part[kVector];
  load_columns(static_cast<const T*>(work.z) + at, column, work.columns, work.whole, z);
  load_columns(work.scale, column, work.columns, false, scale);
  if (work.bias_before != nullptr) {
    load_columns(static_cast<const T*>(work.bias_before), column, work.columns, false, part);
#pragma unroll
    for (int i = 0; i < kVector; ++i) z[i] += part[i];
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) z[i] *= scale[i];
  if (work.bias_after != nullptr) {
    load_columns(static_cast<const T*>(work.bias_after), column, work.columns, false, part);
#pragma unroll
    for (int i = 0; i < kVector; ++i) z[i] += part[i];
  }
  save_columns(static_cast<T*>(work.out) + at, column, work.columns, work.whole, z);
}

struct Drop {
  const void* x;
  const void* add;  // null: 0
  void* out;
  int64_t numel;
  bool whole;  // all lie on 16 bytes
  DeviceDropout dropout;
};

// Grid: ceil(numel / kVector / kColumnThreads); a thread owns one group of the generator's.
template <typename T>
__global__ void __launch_bounds__(kColumnThreads) drop_kernel(Drop work) {
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
