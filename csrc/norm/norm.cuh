// Kernels of RMSNorm and LayerNorm of rows [T, K], and of their gradients:
//
//   x̂ = (x - μ) r;   r = 1/√(mean (x - μ)² + eps);   y = x̂ ∘ (w + offset) + b;   RMSNorm has μ = 0;
//   dX = r (g - mean g - x̂ mean (g ∘ x̂));   g = dY ∘ (w + offset);   dw = Σ_t dY ∘ x̂;   db = Σ_t dY;
//   RMSNorm has no term mean g
//
// A warp computes a row of up to kWarpColumns columns, and a block computes a longer row. A thread loads eight columns
// at a time (16 bytes of a 16-bit dtype). A row is read from memory once, and after that from L1, because each thread
// reads the same columns again. A sum over a row is float32: first over a thread's columns, then over the lanes of a
// warp, then over the warps, in order. For the gradients dw of the weight and db of the bias, a block sums 256 columns
// over a chunk of rows; a second kernel adds the partial sums [chunks][K] in order. Bytes moved: the row kernels read x
// (and dY) once and write y (or dX) once; the kernel for dw and db reads x and dY once more.
#pragma once

#include "linear/cuda/column_reduce.cuh"

namespace peft_ext {

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / kWarpSize;
constexpr int64_t kWarpColumns = 1024;

inline int norm_row_threads(int64_t columns) { return columns <= kWarpColumns ? kWarpSize : kNormThreads; }

struct NormWork {
  const void* x;
  const void* grad;    // dY, read only by norm_gradient_kernel
  const void* weight;  // w [columns]; without a weight (null) the factor of x̂ is 1
  DType weight_type;
  bool weight_whole;  // whether groups of eight columns of the weight are aligned to 16 bytes
  float offset;
  const void* bias;  // b [columns]; a null pointer stands for zeros
  DType bias_type;
  bool bias_whole;
  void* out;           // y in the forward, dX in the gradient
  float *mean, *rstd;  // μ and r [rows] (RMSNorm has no μ); the forward writes both, the gradient reads both
  float eps;
  bool round_first;  // whether x̂ is rounded to x's dtype before it is multiplied by the weight
  int64_t rows, columns;
  bool whole;  // whether columns is a multiple of 8 and all matrices are aligned to 16 bytes
  int row_threads;
};

using NormSums = float[kNormWarps];

// Returns the sum of `value` over the threads of a row to each of these threads. Each call of row_sum in a kernel needs
// its own `shared`.
__device__ __forceinline__ float row_sum(float value, int row_threads, NormSums& shared) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (row_threads == kWarpSize) return value;
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  sync_threads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kNormWarps; ++w) sum += shared[w];
  return sum;
}

// Loads weight + offset for eight columns, or ones if there is no weight.
__device__ __forceinline__ void load_norm_factor(const NormWork& work, int64_t column, float (&factor)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) factor[i] = 1.0f;
  if (work.weight == nullptr) return;
  load_columns(work.weight, work.weight_type, 0, column, work.columns, work.weight_whole, factor);
#pragma unroll
  for (int i = 0; i < kVector; ++i) factor[i] += work.offset;
}

// Grid: ceil(rows · row_threads / kNormThreads) blocks.
template <typename T, typename Out, bool kCentered>
__global__ void __launch_bounds__(kNormThreads) norm_kernel(NormWork work) {
  PEFT_EXT_KERNEL;
  PEFT_EXT_SHARED(NormSums, shared_mean);
  PEFT_EXT_SHARED(NormSums, shared_square);
  const int lane = threadIdx.x % work.row_threads;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kNormThreads / work.row_threads) + threadIdx.x / work.row_threads;
  if (row >= work.rows) return;  // all threads of a row take the same branch
  const int64_t begin = lane * kVector, step = work.row_threads * kVector;
  const T* x = static_cast<const T*>(work.x) + row * work.columns;
  const float count = static_cast<float>(work.columns);
  float mean = 0.0f, values[kVector];
  if (kCentered) {
    float sum = 0.0f;
    for (int64_t column = begin; column < work.columns; column += step) {
      load_columns(x, column, work.columns, work.whole, values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += values[i];
    }
    mean = row_sum(sum, work.row_threads, shared_mean) / count;
  }
  float sum = 0.0f;
  for (int64_t column = begin; column < work.columns; column += step) {
    load_columns(x, column, work.columns, work.whole, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float value = values[i] - mean;
      if (!kCentered || column + i < work.columns) sum += value * value;
    }
  }
  const float rstd = rsqrtf(row_sum(sum, work.row_threads, shared_square) / count + work.eps);
  if (lane == 0) {
    work.rstd[row] = rstd;
    if (kCentered) work.mean[row] = mean;
  }
  for (int64_t column = begin; column < work.columns; column += step) {
    float factor[kVector], bias[kVector] = {};
    load_columns(x, column, work.columns, work.whole, values);
    load_norm_factor(work, column, factor);
    if (kCentered && work.bias != nullptr)
      load_columns(work.bias, work.bias_type, 0, column, work.columns, work.bias_whole, bias);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      float value = (values[i] - mean) * rstd;
      if (work.round_first) value = rounded_to<T>(value);
      value *= factor[i];
      values[i] = kCentered ? value + bias[i] : value;
    }
    save_columns(static_cast<Out*>(work.out) + row * work.columns, column, work.columns, work.whole, values);
  }
}

// Grid: ceil(rows · row_threads / kNormThreads) blocks.
template <typename T, typename Grad, bool kCentered>
__global__ void __launch_bounds__(kNormThreads) norm_gradient_kernel(NormWork work) {
  PEFT_EXT_KERNEL;
  PEFT_EXT_SHARED(NormSums, shared_along);
  PEFT_EXT_SHARED(NormSums, shared_shift);
  const int lane = threadIdx.x % work.row_threads;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kNormThreads / work.row_threads) + threadIdx.x / work.row_threads;
  if (row >= work.rows) return;
  const int64_t begin = lane * kVector, step = work.row_threads * kVector;
  const T* x = static_cast<const T*>(work.x) + row * work.columns;
  const Grad* grad = static_cast<const Grad*>(work.grad) + row * work.columns;
  const float count = static_cast<float>(work.columns), rstd = work.rstd[row], mean = kCentered ? work.mean[row] : 0.0f;
  float along = 0.0f, shift = 0.0f, values[kVector], g[kVector], factor[kVector];
  for (int64_t column = begin; column < work.columns; column += step) {
    load_columns(x, column, work.columns, work.whole, values);
    load_columns(grad, column, work.columns, work.whole, g);
    load_norm_factor(work, column, factor);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      g[i] *= factor[i];  // dY is 0 beyond the end of the row
      along += g[i] * ((values[i] - mean) * rstd);
      if (kCentered) shift += g[i];
    }
  }
  along = row_sum(along, work.row_threads, shared_along) / count;
  if (kCentered) shift = row_sum(shift, work.row_threads, shared_shift) / count;
  for (int64_t column = begin; column < work.columns; column += step) {
    load_columns(x, column, work.columns, work.whole, values);
    load_columns(grad, column, work.columns, work.whole, g);
    load_norm_factor(work, column, factor);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = (g[i] * factor[i] - shift - (values[i] - mean) * rstd * along) * rstd;
    save_columns(static_cast<T*>(work.out) + row * work.columns, column, work.columns, work.whole, values);
  }
}

struct NormColumns {
  const void *x, *grad;
  const float *mean, *rstd;  // μ and r [rows]; a null mean stands for zeros
  // partial sums of dw and db, [row chunks][columns]; null if the call does not need dw or db
  float *weight_sums, *bias_sums;
  int64_t rows, columns;
  bool whole;
};

// Grid: x has a block for each chunk of kColumnRows rows; y has a block for each tile of kColumnTile columns.
template <typename T, typename Grad>
__global__ void __launch_bounds__(kColumnThreads) norm_columns_kernel(NormColumns work) {
  PEFT_EXT_KERNEL;
  PEFT_EXT_SHARED(ColumnSumsShared, shared);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kColumnTile + lane * kVector;
  const int64_t begin = blockIdx.x * kColumnRows, end = min_of(begin + kColumnRows, work.rows);
  float weight[kVector] = {}, bias[kVector] = {};
  if (column < work.columns) {
    for (int64_t row = begin + warp; row < end; row += kColumnWarps) {
      float x[kVector], grad[kVector];
      load_columns(static_cast<const T*>(work.x) + row * work.columns, column, work.columns, work.whole, x);
      load_columns(static_cast<const Grad*>(work.grad) + row * work.columns, column, work.columns, work.whole, grad);
      const float rstd = work.rstd[row], mean = work.mean == nullptr ? 0.0f : work.mean[row];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        weight[i] += grad[i] * ((x[i] - mean) * rstd);
        bias[i] += grad[i];
      }
    }
  }
  if (work.weight_sums != nullptr) save_column_sums(weight, work.columns, work.weight_sums, shared);
  sync_threads();  // all threads must have read the first sums before the second sums overwrite `shared`
  if (work.bias_sums != nullptr) save_column_sums(bias, work.columns, work.bias_sums, shared);
}

}  // namespace peft_ext
