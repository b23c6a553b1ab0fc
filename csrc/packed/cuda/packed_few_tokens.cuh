// Multiplies up to 8 tokens with a packed weight in a format of weight/formats/list.h, and applies the low-rank term,
// the output scale and the biases in the same launch:
//
//   y [T, N] = g ∘ (x Wᵀ + scaling (S ∘ rank_scale) Bᵀ + b₀) + b₁,   T <= 8,  S [T, R] given
//
// g is the output scale (of DoRA or IA3), b₀ is the bias that g also multiplies, and b₁ is the bias that g does not
// multiply. A thread block of 4 warps computes 4 outputs for all tokens. In each step a thread loads 8 inputs of each
// token, decodes the 8 weights of each output in registers, as in packed.cuh, and adds the products to one sum for each
// output and token. The arithmetic is float32 FMAs; a weight is not rounded to x's dtype. The sums of a warp's lanes
// are added by exchanges between lanes: in each exchange a lane gives away half of its sums and keeps the other half,
// until the lane has one sum. The warps' sums are added in shared memory, in order, so that the order of the sum is
// equal on every GPU. Shared memory: 4 · 4 · kTokens floats, where kTokens is 1, 4 or 8. Bytes moved: the parts of W
// once; x once per thread block, from L2 and L1.
//
// NVRTC options: --fmad=false
#pragma once

#include "nf4/cuda/nf4_few_tokens.cuh"
#include "packed/cuda/packed.cuh"

namespace peft_ext {

constexpr int kPackedFewThreads = 128;
constexpr int kPackedFewWarps = kPackedFewThreads / kWarpSize;
constexpr int kPackedFewRows = 4;  // number of outputs that a thread block computes
constexpr int kPackedFewTokens = 8;

struct PackedFew {
  const void* x;      // x [tokens, inputs] of type T
  PackedView weight;  // W [outputs, inputs], each part aligned to 16 bytes
  int tokens;
  bool whole;  // whether inputs is a multiple of 8 and x is aligned to 16 bytes
  TokensFinish finish;
};

// Each warp's sums. The sums are in a struct, because NVRTC 12.6 crashes at an alias template for an array in
// PEFT_EXT_SHARED.
template <int kSums>
struct PackedFewShared {
  float sums[kPackedFewWarps][kSums];
};

// Adds each of the kSums sums over the lanes of the warp; kSums is a power of two of at most 32. Returns the total of
// the sum with the number lane / (32 / kSums).
template <int kSums>
__device__ __forceinline__ float sum_over_lanes(float (&sums)[kSums], int lane) {
#pragma unroll
  for (int level = 1; level <= 5; ++level) {                     // five exchanges, because a warp has 2^5 lanes
    const int mask = kWarpSize >> level, left = kSums >> level;  // `left`: number of sums that the lane keeps
    if (left == 0) sums[0] += shuffle_xor(sums[0], mask);
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) {
      if (i >= left) continue;
      const bool upper = (lane & mask) != 0;
      const float given = upper ? sums[i] : sums[i + left], kept = upper ? sums[i + left] : sums[i];
      sums[i] = kept + shuffle_xor(given, mask);
    }
  }
  return sums[0];
}

// kTokens: the largest number of tokens that the instance of the kernel can compute. Grid: ceil(outputs /
// kPackedFewRows) thread blocks.
template <int kNumber, typename T, int kTokens>
__global__ void __launch_bounds__(kPackedFewThreads, kTokens == 8 ? 3 : 4) packed_few_tokens_kernel(PackedFew work) {
  PEFT_EXT_KERNEL;
  using Format = typename FormatOf<kNumber>::Type;
  constexpr int kSums = kPackedFewRows * kTokens;
  PEFT_EXT_SHARED(PackedFewShared<kSums>, shared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPackedFewRows, inputs = work.weight.columns;
  // A sum for an output or a token beyond the last one is computed with the last output or token instead, and is not
  // stored.
  int64_t rows[kPackedFewRows];
#pragma unroll
  for (int r = 0; r < kPackedFewRows; ++r) rows[r] = min_of(first + r, work.weight.rows - 1);
  const T* x[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) x[t] = static_cast<const T*>(work.x) + min_of(t, work.tokens - 1) * inputs;

  float sums[kSums] = {};
  int64_t k = static_cast<int64_t>(threadIdx.x) * kVector;
  for (; k + kVector <= inputs; k += kPackedFewThreads * kVector) {
    float held[kTokens][kVector];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) load_columns(x[t], k, inputs, work.whole, held[t]);
#pragma unroll
    for (int r = 0; r < kPackedFewRows; ++r) {
      float weights[kVector];
      decode_columns<Format>(work.weight, rows[r], k, weights);
#pragma unroll
      for (int t = 0; t < kTokens; ++t)
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums[r * kTokens + t] = fma_rn(weights[i], held[t][i], sums[r * kTokens + t]);
    }
  }
#pragma unroll 1
  for (; k < inputs; ++k) {  // the last columns, if inputs is no multiple of 8: one thread has these columns
#pragma unroll
    for (int r = 0; r < kPackedFewRows; ++r) {
      const float weight = Format::value(work.weight, rows[r], k);
#pragma unroll
      for (int t = 0; t < kTokens; ++t)
        sums[r * kTokens + t] = fma_rn(weight, load_value(x[t] + k), sums[r * kTokens + t]);
    }
  }

  const int lane = threadIdx.x % kWarpSize;
  constexpr int kLanes = kWarpSize / kSums;  // number of lanes that return the same sum
  const float total = sum_over_lanes(sums, lane);
  if (lane % kLanes == 0) shared.sums[threadIdx.x / kWarpSize][lane / kLanes] = total;
  sync_threads();
  if (threadIdx.x >= kSums) return;
  const int token = threadIdx.x % kTokens;
  const int64_t row = first + threadIdx.x / kTokens;
  if (token >= work.tokens || row >= work.weight.rows) return;
  float sum[1] = {};
#pragma unroll
  for (int w = 0; w < kPackedFewWarps; ++w) sum[0] += shared.sums[w][threadIdx.x];
  finish_tokens<T, 1>(work.finish, work.weight.rows, row, token, work.tokens, sum);
}

}  // namespace peft_ext
