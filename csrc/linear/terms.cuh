// A float as a sum of bfloat16 terms, so that tensor cores make products of float32 precision.
//
// v = v₀ + v₁ + v₂, v_i the bfloat16 nearest to what v_0 … v_{i-1} leave: 8 bits each, and float32's range. A bfloat16
// has one term, a float16 two, a float32 three. Of a product of sums, the terms i, j with i + j <= 2 are made: what is
// left out is below 2⁻²⁴ of it.
#pragma once

#include "common/vector.cuh"

namespace peft_ext {

constexpr int kMaxTerms = 3;

template <typename T>
constexpr int kTermsOf = 3;
template <>
inline constexpr int kTermsOf<f16> = 2;
template <>
inline constexpr int kTermsOf<bf16> = 1;

// Pairs of terms of two floats, the first in the low halves.
template <int kTerms>
__device__ __forceinline__ void split_pair(float low, float high, uint32_t (&terms)[kTerms]) {
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    terms[i] = pack2<bf16>(low, high);
    if (i + 1 < kTerms) {
      const float2 taken = unpack2<bf16>(terms[i]);
      low = fadd_rn(low, -taken.x);
      high = fadd_rn(high, -taken.y);
    }
  }
}

// A small matrix in terms, as a B operand (or the A operand of `expand`) takes it: bfloat16 [count][outer][inner], the
// dimension that is summed over last, zeros where padded.
struct Terms {
  const uint16_t* data = nullptr;
  int count = 0;
  int64_t outer = 0;  // padded
  int64_t inner = 0;  // padded
};

// The pair (inner, inner + 1) of a row of one term.
__device__ __forceinline__ uint32_t load_terms(const Terms& terms, int term, int64_t outer, int64_t inner) {
  const int64_t at = (term * terms.outer + outer) * terms.inner + inner;
  return load_cached(reinterpret_cast<const uint32_t*>(terms.data + at));
}

// C_n += A B_n for kTiles tiles of 16 x 8 and 16 of the summed dimension, over the terms of both; B_n's lane row is
// outer + n * step. A term of all tiles is loaded at once; kUnrolled: how many terms' loads may be under way.
template <int kTiles, int kLeft, int kUnrolled>
__device__ __forceinline__ void mma_terms(float (&c)[kTiles][4], const uint32_t (&a)[kLeft][4], const Terms& right,
                                          int64_t outer, int64_t step, int64_t inner) {
#pragma unroll kUnrolled
  for (int j = 0; j < kMaxTerms; ++j) {
    if (j >= right.count) break;
    uint32_t b[kTiles][2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      b[n][0] = load_terms(right, j, outer + n * step, inner);
      b[n][1] = load_terms(right, j, outer + n * step, inner + 8);
    }
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      if (i + j >= kMaxTerms) break;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) mma_m16n8k16<bf16>(c[n], a[i], b[n]);
    }
  }
}

// out[term][o][i] = term of in[o, i] · inner_scale[i], for a matrix of any strides.
struct Split {
  const void* in;
  DType type;
  int64_t outer, inner, outer_stride, inner_stride;
  const float* inner_scale;  // null: 1
  uint16_t* out;
  int count;
  int64_t outer_padded, inner_padded;
};

constexpr int kMaxSplits = 3;
constexpr int kSplitThreads = 256;

// The small matrices of one call, in one launch: each alone would be all launch.
struct Splits {
  Split work[kMaxSplits];
};

// Grid: x: ceil(outer_padded · inner_padded / 2 / kSplitThreads) blocks of the largest; y: which matrix. A thread makes
// one pair of each term.
__global__ void __launch_bounds__(kSplitThreads) split_kernel(Splits splits) {
  const Split& work = splits.work[blockIdx.y];
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kSplitThreads + threadIdx.x;
  const int64_t pairs = work.inner_padded / 2, o = pair / pairs, i = pair % pairs * 2;
  if (o >= work.outer_padded) return;
  float values[2] = {0.0f, 0.0f};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (o >= work.outer || i + e >= work.inner) continue;
    float value = load_value(work.in, work.type, o * work.outer_stride + (i + e) * work.inner_stride);
    if (work.inner_scale != nullptr) value *= work.inner_scale[i + e];
    values[e] = value;
  }
  uint32_t terms[kMaxTerms];
  split_pair<kMaxTerms>(values[0], values[1], terms);
  uint32_t* out = reinterpret_cast<uint32_t*>(work.out) + o * pairs + i / 2;
  for (int term = 0; term < work.count; ++term) out[term * work.outer_padded * pairs] = terms[term];
}

}  // namespace peft_ext
