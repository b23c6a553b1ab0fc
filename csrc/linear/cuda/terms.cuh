// A float as a sum of bfloat16 terms, so that tensor cores make products of float32 precision.
//
// v = v₀ + v₁ + v₂, v_i the bfloat16 nearest to what v_0 … v_{i-1} leave: 8 bits each, and float32's range. A bfloat16
// has one term, a float16 two, a float32 three. Of a product of sums, the terms i, j with i + j <= 2 are made: what is
// left out is below 2⁻²⁴ of it.
#pragma once

#include "cuda/vector.cuh"

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

// A small matrix [outer, inner] in terms, as a B operand (or the A operand of `expand`) takes it: inner is summed over,
// zeros where padded, outer to a multiple of 8 and inner to one of 16. Its pairs along inner lie in the order of
// fragments: by term, by 8 of outer, by 16 of inner, by lane (outer % 8 · 4 + inner % 8 / 2), and of a lane the pair of
// the lower 8 of inner before that of the upper. So a lane's share of a fragment is 8 bytes, a warp's 256 in a row.
struct Terms {
  const uint2* data = nullptr;
  int count = 0;
  int64_t outer = 0;  // padded
  int64_t inner = 0;  // padded
};

// Where the pair (inner, inner + 1) of a row of one term lies, in words of 4 bytes.
__device__ __forceinline__ int64_t terms_word(int64_t outer_padded, int64_t inner_padded, int64_t term, int64_t outer,
                                              int64_t inner) {
  const int64_t block = (term * (outer_padded / 8) + outer / 8) * (inner_padded / 16) + inner / 16;
  return block * 64 + (outer % 8 * 4 + inner % 8 / 2) * 2 + inner % 16 / 8;
}

// The terms of the pair (row, column), (row, column + 1) of a matrix: into Terms [rows, columns] and into those of its
// transpose, where each is wanted.
__device__ __forceinline__ void save_terms(float low, float high, int64_t rows, int64_t columns, int64_t row,
                                           int64_t column, uint32_t* straight, uint32_t* transposed) {
  uint32_t terms[kMaxTerms];
  split_pair<kMaxTerms>(low, high, terms);
#pragma unroll
  for (int term = 0; term < kMaxTerms; ++term) {
    if (straight != nullptr) straight[terms_word(rows, columns, term, row, column)] = terms[term];
    if (transposed == nullptr) continue;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t word = terms_word(columns, rows, term, column + e, row / 2 * 2);
      reinterpret_cast<uint16_t*>(transposed)[2 * word + row % 2] = static_cast<uint16_t>(terms[term] >> 16 * e);
    }
  }
}

// A lane's pairs of the fragment of rows 8 · outer_block … and of 16 · inner_block … of the summed dimension.
__device__ __forceinline__ uint2 load_terms(const Terms& terms, int term, int64_t outer_block, int64_t inner_block,
                                            int lane) {
  const int64_t block = (term * (terms.outer / 8) + outer_block) * (terms.inner / 16) + inner_block;
  return load_cached(terms.data + block * kWarpSize + lane);
}

// Which fragments of a Terms the tiles n of a product take: block + n · block_step, and of it the lane's share of
// lane + n · lane_step.
struct TermTiles {
  int64_t block;
  int block_step, lane, lane_step;
};

// C_n += A B_n for kTiles tiles of 16 x 8 and 16 of the summed dimension, over the terms of both, the small products
// first: a tensor core rounds toward zero, and would take up to an ulp of the large ones for each that follows them. A
// term of all tiles is loaded at once; kUnrolled: how many terms' loads may be under way.
template <int kTiles, int kLeft, int kUnrolled>
__device__ __forceinline__ void mma_terms(float (&c)[kTiles][4], const uint32_t (&a)[kLeft][4], const Terms& right,
                                          const TermTiles& tiles, int64_t inner_block) {
#pragma unroll kUnrolled
  for (int j = kMaxTerms - 1; j >= 0; --j) {
    if (j >= right.count) continue;
    uint2 b[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      b[n] = load_terms(right, j, tiles.block + n * tiles.block_step, inner_block, tiles.lane + n * tiles.lane_step);
#pragma unroll
    for (int i = kLeft - 1; i >= 0; --i) {
      if (i + j >= kMaxTerms) continue;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint32_t pairs[2] = {b[n].x, b[n].y};
        mma_m16n8k16<bf16>(c[n], a[i], pairs);
      }
    }
  }
}

// The terms of in[o, i] · inner_scale[i], for a matrix of any strides.
struct Split {
  const void* in;
  DType type;
  int64_t outer, inner, outer_stride, inner_stride;
  const float* inner_scale;  // null: 1
  uint32_t* out;             // as Terms has them
  int count;
  int64_t outer_padded, inner_padded;
};

constexpr int kMaxSplits = 3;
constexpr int kSplitThreads = 256;

// The small matrices of one call, in one launch: each alone would be all launch.
struct Splits {
  Split work[kMaxSplits];
};

}  // namespace peft_ext
