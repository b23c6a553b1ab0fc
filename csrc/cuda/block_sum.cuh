// The sum of a value over the threads of a block. The order of the additions is the same in every call.
#pragma once

#include "cuda/ptx.cuh"

namespace peft_ext {

template <int kThreads>
using BlockSums = float[kThreads / kWarpSize];

// Returns the sum of `value` over the block at thread 0, and 0 at all other threads. All threads of the block must call
// block_sum.
template <int kThreads>
__device__ __forceinline__ float block_sum(float value, BlockSums<kThreads>& shared) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  sync_threads();
  float sum = 0.0f;
  if (threadIdx.x == 0)
    for (int w = 0; w < kThreads / kWarpSize; ++w) sum += shared[w];
  return sum;
}

}  // namespace peft_ext
