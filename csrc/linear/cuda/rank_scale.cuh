// Computes the gradient of rank_scale from B and from the product Q = (g ∘ dY)ᵀ S, which the backward also needs for
// dB, without another pass over activations.
#pragma once

#include "cuda/block_sum.cuh"
#include "linear/cuda/columns.cuh"

namespace peft_ext {

// out[r] = scale Σ_n B[n, r] Q[n, r]. Grid: one thread block for each rank.
static __global__ void __launch_bounds__(kColumnThreads)
    rank_scale_kernel(const float* lora_B, const float* products, int64_t rows, int64_t rank, float scale, float* out) {
  PEFT_EXT_KERNEL;
  PEFT_EXT_SHARED(BlockSums<kColumnThreads>, shared);
  float sum = 0.0f;
  for (int64_t n = threadIdx.x; n < rows; n += kColumnThreads)
    sum += lora_B[n * rank + blockIdx.x] * products[n * rank + blockIdx.x];
  sum = block_sum<kColumnThreads>(sum, shared);
  if (threadIdx.x == 0) out[blockIdx.x] = scale * sum;
}

}  // namespace peft_ext
