// S [T, R] = x̃ Aᵀ for few tokens, in one launch: what generation runs, where a launch costs more than the arithmetic.
//
// A block owns one rank and kShrinkTokens tokens; its threads share K, eight inputs at a time, and read A's row once
// for all its tokens. float32 FMAs; a warp's sums meet by shuffles, the warps' in shared memory, always in the same
// order. Bytes moved: A once a group of tokens, x once a rank (from L2 but for the first).
#pragma once

#include "cuda/vector.cuh"

namespace peft_ext {

constexpr int kShrinkThreads = 128;
constexpr int kShrinkWarps = kShrinkThreads / kWarpSize;
constexpr int kShrinkTokens = 4;

struct ShrinkFew {
  const void* x;       // T [tokens, inputs]
  const void* lora_A;  // [rank, inputs]
  DType type;          // lora_A's
  int64_t tokens, inputs, rank;
  bool whole, whole_A;  // inputs is a multiple of 8 and the matrix lies on 16 bytes
  DeviceDropout dropout;
  float* s;  // [tokens, rank]
};

using ShrinkShared = float[kShrinkTokens][kShrinkWarps];

// Grid: x: rank; y: ceil(tokens / kShrinkTokens).
template <typename T>
__global__ void __launch_bounds__(kShrinkThreads) shrink_few_kernel(ShrinkFew work) {
  PEFT_EXT_SHARED(ShrinkShared, shared);
  const int64_t r = blockIdx.x, first = static_cast<int64_t>(blockIdx.y) * kShrinkTokens;
  const Philox philox = load_philox(work.dropout);
  float sums[kShrinkTokens] = {};
  for (int64_t k = threadIdx.x * kVector; k < work.inputs; k += kShrinkThreads * kVector) {
    float a[kVector];
    load_columns(work.lora_A, work.type, r * work.inputs, k, work.inputs, work.whole_A, a);
#pragma unroll
    for (int t = 0; t < kShrinkTokens; ++t) {
      if (first + t >= work.tokens) continue;
      const int64_t row = (first + t) * work.inputs;
      float x[kVector];
      load_columns(static_cast<const T*>(work.x) + row, k, work.inputs, work.whole, x);
      if (work.dropout.seed != nullptr) {
        const uint32_t kept = kept_elements(philox, row + k, work.whole);
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[i] = (kept >> i) & 1u ? x[i] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[t] += x[i] * a[i];
    }
  }
#pragma unroll
  for (int t = 0; t < kShrinkTokens; ++t) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sums[t] += shuffle_xor(sums[t], mask);
    if (threadIdx.x % kWarpSize == 0) shared[t][threadIdx.x / kWarpSize] = sums[t];
  }
  sync_threads();
  if (threadIdx.x >= kShrinkTokens || first + threadIdx.x >= work.tokens) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kShrinkWarps; ++w) sum += shared[threadIdx.x][w];
  work.s[(first + threadIdx.x) * work.rank + r] = sum * work.dropout.scale;
}

}  // namespace peft_ext
