// Computes S [T, R] = x̃ Aᵀ for few tokens in one launch, because in generation a launch costs more time than the
// arithmetic.
//
// A thread block computes S for one rank and up to kShrinkTokens tokens. The block's threads divide K, eight inputs at
// a time, and read A's row once for all tokens of the block. The kernels of this file multiply with float32 FMAs, not
// on tensor cores. The sums of a warp's lanes are added by shuffles, and the sums of the warps are added in shared
// memory, always in the same order. In a mixed batch, all tokens of a thread block have the same adapter, or all have
// none. Bytes moved: A once for each group of kShrinkTokens tokens; x once for each rank, after the first time from L2.
#pragma once

#include "nf4/cuda/nf4_few_tokens.cuh"

namespace peft_ext {

constexpr int kShrinkThreads = 128;
constexpr int kShrinkWarps = kShrinkThreads / kWarpSize;
constexpr int kShrinkTokens = 4;

struct ShrinkFew {
  const void* x;       // x [tokens, inputs] of type T
  const void* lora_A;  // [rank, inputs]
  DType type;          // dtype of lora_A
  int64_t tokens, inputs, rank;
  bool whole, whole_A;  // for x and for lora_A: whether inputs is a multiple of 8 and the matrix is aligned to 16 bytes
  DeviceDropout dropout;
  float* s;  // [tokens, rank]
};

using ShrinkShared = float[kShrinkTokens][kShrinkWarps];

// Computes the products of row r of A with up to kShrinkTokens rows of x̃. Thread t returns the product with row
// token_of(t) of x̃. token_of(t) is -1 if thread t has no token.
template <typename T, typename TokenOf>
__device__ __forceinline__ float shrink_tokens(const ShrinkFew& work, const void* lora_A, DType type, bool whole_A,
                                               int64_t r, TokenOf token_of) {
  PEFT_EXT_SHARED(ShrinkShared, shared);
  const Philox philox = load_philox(work.dropout);
  float sums[kShrinkTokens] = {};
  for (int64_t k = threadIdx.x * kVector; k < work.inputs; k += kShrinkThreads * kVector) {
    float a[kVector];
    load_columns(lora_A, type, r * work.inputs, k, work.inputs, whole_A, a);
#pragma unroll
    for (int t = 0; t < kShrinkTokens; ++t) {
      if (token_of(t) < 0) continue;
      const int64_t row = token_of(t) * work.inputs;
      float x[kVector];
      load_columns(static_cast<const T*>(work.x) + row, k, work.inputs, work.whole, x);
      if (work.dropout.active) {
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
  float sum = 0.0f;
  if (threadIdx.x < kShrinkTokens) {
#pragma unroll
    for (int w = 0; w < kShrinkWarps; ++w) sum += shared[threadIdx.x][w];
  }
  return sum * work.dropout.scale;
}

// Grid: x has a thread block for each rank; y has one for each kShrinkTokens tokens.
template <typename T>
__global__ void __launch_bounds__(kShrinkThreads) shrink_few_kernel(ShrinkFew work) {
  PEFT_EXT_KERNEL;
  const int64_t r = blockIdx.x, first = static_cast<int64_t>(blockIdx.y) * kShrinkTokens;
  const auto token_of = [&](int t) { return first + t < work.tokens ? first + t : -1; };
  const float sum = shrink_tokens<T>(work, work.lora_A, work.type, work.whole_A, r, token_of);
  if (threadIdx.x < kShrinkTokens && first + threadIdx.x < work.tokens)
    work.s[(first + threadIdx.x) * work.rank + r] = sum;
}

// The tokens of one thread block in a mixed batch: up to kShrinkTokens tokens that have the same adapter, or that all
// have none (then lora_A is null and factor.rank is 0).
struct DeviceTokenGroup {
  const void* lora_A;  // [factor.rank, inputs]
  DType type_A;
  bool whole_A;
  TokenFactor factor;
  int count;
  int8_t tokens[kShrinkTokens];
};

constexpr int kGroupedFewTokens = 64;

// The arguments of shrink_grouped_kernel, for a mixed batch. The arguments contain the table of the token groups and
// all numbers that the kernel needs, so that the kernel reads only tensors from device memory and nothing is copied
// from the host to the device. few.s [tokens, rank] receives zeros beyond the rank of a token's adapter.
struct ShrinkGrouped {
  ShrinkFew few;         // the kernel uses only the fields x, inputs, whole, rank and s
  TokenFactor* factors;  // [tokens]: receives the TokenFactors that the next kernel reads
  DeviceTokenGroup groups[kGroupedFewTokens];
};
static_assert(sizeof(ShrinkGrouped) <= 4096, "a launch's arguments");

// Grid: x has a thread block for each rank; y has one for each DeviceTokenGroup.
template <typename T>
__global__ void __launch_bounds__(kShrinkThreads) shrink_grouped_kernel(ShrinkGrouped work) {
  PEFT_EXT_KERNEL;
  const DeviceTokenGroup& group = work.groups[blockIdx.y];
  const int64_t r = blockIdx.x;
  int64_t tokens[kShrinkTokens];
#pragma unroll
  for (int t = 0; t < kShrinkTokens; ++t) tokens[t] = group.tokens[t];
  const bool mine = static_cast<int>(threadIdx.x) < group.count;
  const int64_t token = mine ? group.tokens[threadIdx.x % kShrinkTokens] : 0;
  if (mine && r == 0) work.factors[token] = group.factor;
  float sum = 0.0f;
  if (r < group.factor.rank)
    sum = shrink_tokens<T>(work.few, group.lora_A, group.type_A, group.whole_A, r,
                           [&](int t) { return t < group.count ? tokens[t] : -1; });
  if (mine) work.few.s[token * work.few.rank + r] = sum;
}

}  // namespace peft_ext
