// What a small matrix product brings to a large matrix, in one pass over it:
//
//   out [T, N] = (before or 0) + mask/(1-p) ∘ (L Fᵀ) + (g - 1) ∘ z + bias,    L [T, R],  F [N, R]
//
// as the low-rank term that PyTorch's product then adds to (Y₀ = S (ρB)ᵀ + b), and dX's term behind the dropout, whose
// mask is made again here; a bottleneck adapter's output on its residual; with g and z as the output of PEFT's DoRA, Y
// = x Wᵀ + b + g ∘ Z - x̃ Wᵀ with Z = x̃ Wᵀ + L Fᵀ. L and F come in bfloat16 terms, R padded to a multiple of 16, or 0
// for the bias alone. A block of 4 warps owns 64 x 64 of out, a warp 16 rows. The columns that a lane's accumulators
// stand for are chosen so that it holds eight in a row: column 32 h + 8 (g / 2) + 2 j + g % 2 of F is row g of B tile
// j, and C's columns 2t, 2t + 1 of the four tiles of h are 32 h + 8 t …: one store of 16 bytes (32 of float32), one
// group of the generator's. No shared memory. float32 sums, one rounding. Bytes moved: out, once (twice where it is
// added to).
#pragma once

#include "linear/cuda/terms.cuh"

namespace peft_ext {

constexpr int kExpandTile = 64;
constexpr int kExpandThreads = 128;

struct ExpandTerms {
  void* out;
  int64_t rows, columns;
  bool whole;  // columns is a multiple of 8 and out, before and z lie on 16 bytes
  Terms left;  // outer: rows, inner: rank
  Terms right;
  const void* before;  // T [rows, columns], which may be out itself, or null
  const void* bias;    // [columns] of bias_type, times bias_scale, or null
  DType bias_type;
  float bias_scale;
  const void* z;       // T [rows, columns], or null
  const float* scale;  // g [columns], with z
  DeviceDropout dropout;
};

// Grid: x: tiles of rows; y: tiles of columns.
template <typename T>
__global__ void __launch_bounds__(kExpandThreads) expand_kernel(ExpandTerms work) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kExpandTile + warp * 16 + g;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kExpandTile;

  // A fresh accumulator per 64 ranks: a tensor core's own sum rounds toward zero.
  const int64_t row_block = (row - g) / 8, steps = work.left.inner / 16;
  float sums[2][4][4] = {};
  for (int64_t first = 0; first < steps; first += 4) {
    float fresh[2][4][4] = {};
    const int64_t last = min_of(first + 4, steps);
    for (int64_t k = first; k < last; ++k) {
      uint32_t a[kMaxTerms][4];
#pragma unroll
      for (int i = 0; i < kMaxTerms; ++i) {
        const uint2 upper = load_terms(work.left, i, row_block, k, lane);
        const uint2 lower = load_terms(work.left, i, row_block + 1, k, lane);
        a[i][0] = upper.x;
        a[i][1] = lower.x;
        a[i][2] = upper.y;
        a[i][3] = lower.y;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
        mma_terms<4, kMaxTerms, 1>(fresh[h], a, work.right, {column / 8 + 4 * h + g / 2, 0, g % 2 * 4 + t, 8}, k);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[h][j][i] += fresh[h][j][i];
  }

  const Philox philox = load_philox(work.dropout);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t first = column + 32 * h + 8 * t;
    if (first >= work.columns) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = row + 8 * half;
      if (at >= work.rows) continue;
      float values[kVector];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[2 * j] = sums[h][j][2 * half];
        values[2 * j + 1] = sums[h][j][2 * half + 1];
      }
      if (work.dropout.seed != nullptr) {
        const uint32_t kept = kept_elements(philox, at * work.columns + first, work.whole);
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = (kept >> i) & 1u ? values[i] * work.dropout.scale : 0.0f;
      }
      T* out = static_cast<T*>(work.out) + at * work.columns;
      if (work.before != nullptr) {
        float before[kVector];
        load_columns(static_cast<const T*>(work.before) + at * work.columns, first, work.columns, work.whole, before);
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] += before[i];
      }
      if (work.z != nullptr) {
        float z[kVector], scale[kVector];
        load_columns(static_cast<const T*>(work.z) + at * work.columns, first, work.columns, work.whole, z);
        load_columns(work.scale, first, work.columns, false, scale);
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] += (scale[i] - 1.0f) * z[i];
      }
      if (work.bias != nullptr) {
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          if (first + i < work.columns) values[i] += work.bias_scale * load_value(work.bias, work.bias_type, first + i);
      }
      save_columns(out, first, work.columns, work.whole, values);
    }
  }
}

}  // namespace peft_ext
