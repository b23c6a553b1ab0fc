// Computes DoRA's norm n of each row of W + s B A, where s is the LoRA scaling, and the gradients through n. The
// kernels never form the matrix W + s B A. One pass over W (linear/cuda/rank_pass.cuh) computes U = W Aᵀ [N, R] and the
// sum of squares of each row of W. M is A Aᵀ [R, R].
//
//   n² = ‖W‖² + Σ_r s B_r (2 U_r + s (B M)_r), clamped to 0 or more
//
// The gradient, with c = dn / n, or 0 where n = 0: dB = c s (U + s B M); dA = s (cB)ᵀ W + s² (cB)ᵀ B A, where (cB)ᵀ W
// is one more pass over W. A warp computes the norm of one row of W + s B A, and the warp's lanes divide the ranks. The
// arithmetic of all kernels in this file is float32.
#pragma once

#include "cuda/vector.cuh"

namespace peft_ext {

constexpr int kNormThreads = 128;
constexpr int kNormRows = kNormThreads / kWarpSize;

struct Norm {
  const float* u;        // [rows, rank]
  const float* squares;  // [chunks][padded_rows]
  int64_t chunks, padded_rows;
  const float* products;  // M = A Aᵀ [rank, rank]
  const float* lora_B;    // [rows, rank]
  float scaling;
  int64_t rows, rank;
  float* norm;  // n [rows]; the forward writes n, and the backward reads n
  const float* grad;
  float* left;    // c B [rows, rank], which the backward writes
  float* grad_B;  // dB [rows, rank], which the backward writes
};

// Returns (B M)[r] for one row of B, where M is work.products.
__device__ __forceinline__ float norm_product(const Norm& work, const float* b, int64_t r) {
  float sum = 0.0f;
  for (int64_t q = 0; q < work.rank; ++q) sum += b[q] * work.products[r * work.rank + q];  // M is symmetric
  return sum;
}

// Grid: ceil(rows / kNormRows) thread blocks.
static __global__ void __launch_bounds__(kNormThreads) dora_norm_kernel(Norm work) {
  PEFT_EXT_KERNEL;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kNormRows + threadIdx.x / kWarpSize;
  if (row >= work.rows) return;
  const int lane = threadIdx.x % kWarpSize;
  const float* b = work.lora_B + row * work.rank;
  float sum = 0.0f;
  for (int64_t r = lane; r < work.rank; r += kWarpSize)
    sum += work.scaling * b[r] * (2.0f * work.u[row * work.rank + r] + work.scaling * norm_product(work, b, r));
  for (int64_t chunk = lane; chunk < work.chunks; chunk += kWarpSize)
    sum += work.squares[chunk * work.padded_rows + row];
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane == 0) work.norm[row] = sqrtf(sum < 0.0f ? 0.0f : sum);
}

// Grid: ceil(rows / kNormRows) thread blocks.
static __global__ void __launch_bounds__(kNormThreads) dora_norm_backward_kernel(Norm work) {
  PEFT_EXT_KERNEL;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kNormRows + threadIdx.x / kWarpSize;
  if (row >= work.rows) return;
  const float* b = work.lora_B + row * work.rank;
  const float length = work.norm[row], c = length == 0.0f ? 0.0f : work.grad[row] / length;
  for (int64_t r = threadIdx.x % kWarpSize; r < work.rank; r += kWarpSize) {
    const int64_t at = row * work.rank + r;
    work.left[at] = c * b[r];
    work.grad_B[at] = c * work.scaling * (work.u[at] + work.scaling * norm_product(work, b, r));
  }
}

// dA[r, k] = s outer[k, r] + s² Σ_q inner[q, r] A[q, k],  outer = Wᵀ (cB) [inputs, rank], inner = Bᵀ (cB) [rank, rank].
struct NormGradA {
  const float* outer;
  const float* inner;
  const float* lora_A;  // [rank, inputs]
  float scaling;
  int64_t rank, inputs;
  float* grad_A;
};

// Grid: x has ceil(inputs / kNormThreads) thread blocks; y has one for each rank.
static __global__ void __launch_bounds__(kNormThreads) dora_norm_grad_A_kernel(NormGradA work) {
  PEFT_EXT_KERNEL;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kNormThreads + threadIdx.x, r = blockIdx.y;
  if (k >= work.inputs) return;
  float sum = 0.0f;
  for (int64_t q = 0; q < work.rank; ++q) sum += work.inner[q * work.rank + r] * work.lora_A[q * work.inputs + k];
  work.grad_A[r * work.inputs + k] = work.scaling * work.outer[k * work.rank + r] + work.scaling * work.scaling * sum;
}

}  // namespace peft_ext
