// A float as a sum of bfloat16 terms, so that tensor cores make products of float32 precision.
//
// v = v₀ + v₁ + v₂, v_i the bfloat16 nearest to what v_0 … v_{i-1} leave: 8 bits each, and float32's range. A bfloat16
// has one term, a float16 two, a float32 three. Of a product of sums, the terms i, j with i + j <= 2 are made: what is
// left out is below 2⁻²⁴ of it. Where the result is rounded to 16 bits at once, two terms and i + j <= 1 do: below
// 2⁻¹⁶.
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

// The orders that a small matrix's terms lie in: each is the order of the fragments of one operand, so that a lane's
// share is 16 bytes and a warp's 512 in a row, and a 64 x 64 tile's are together, at distances that the compiler knows.
enum class TermsOrder : int {
  kPass,   // B of a rank pass: outer are ranks, inner what is summed over; of a lane two steps of 16
  kLeft,   // A of expand: outer are rows, inner ranks
  kRight,  // B of expand: outer are columns, inner ranks; of a lane two tiles of 8, see expand.cuh
};

// A small matrix [outer, inner] in terms, zeros where padded. inner is summed over, and padded to a multiple of 16 (of
// 64 in kPass); outer is padded to 16, to 32, or to a multiple of 64 (kRight: to that).
struct Terms {
  const uint4* data = nullptr;
  int count = 0;
  int64_t outer = 0;  // padded
  int64_t inner = 0;  // padded
  TermsOrder order = TermsOrder::kPass;
};

// Words of 4 bytes, each a pair of terms along inner, of a step of 16: of eight of outer.
constexpr int kFragmentWords = 64;

// Where the pair (outer, inner), (outer, inner + 1) of one term lies, in words. `count` terms lie there.
__device__ __forceinline__ int64_t terms_word(TermsOrder order, int count, int64_t outer_padded, int64_t inner_padded,
                                              int term, int64_t outer, int64_t inner) {
  const int upper = static_cast<int>(inner % 16 / 8), t = static_cast<int>(inner % 8 / 2);
  if (order == TermsOrder::kPass) {
    const int64_t blocks = min_of(outer_padded, 64) / 8, tile = outer / 64 * (inner_padded / 64) + inner / 64;
    const int64_t fragment = ((tile * count + term) * blocks + outer % 64 / 8) * 2 + inner % 64 / 32;
    return fragment * (2 * kFragmentWords) + (outer % 8 * 4 + t) * 4 + inner % 32 / 16 * 2 + upper;
  }
  if (order == TermsOrder::kLeft) {
    const int64_t fragment = (outer / 16 * (inner_padded / 16) + inner / 16) * count + term;
    return fragment * (2 * kFragmentWords) + (outer % 8 * 4 + t) * 4 + upper * 2 + outer % 16 / 8;
  }
  const int64_t column = outer % 64, tile = column % 8 / 2;  // of 8 columns; its row is g
  const int64_t g = column % 32 / 8 * 2 + column % 2;
  const int64_t fragment =
      ((outer / 64 * (inner_padded / 16) + inner / 16) * count + term) * 4 + column / 32 * 2 + tile / 2;
  return fragment * (2 * kFragmentWords) + (g * 4 + t) * 4 + tile % 2 * 2 + upper;
}

// Terms to be written.
struct TermsOut {
  uint32_t* data = nullptr;  // null: not wanted
  int count = 0;
  int64_t outer = 0, inner = 0;  // padded
  TermsOrder order = TermsOrder::kPass;
};

// The terms of the pair (outer, inner), (outer, inner + 1).
__device__ __forceinline__ void save_terms(const TermsOut& out, int64_t outer, int64_t inner, float low, float high) {
  uint32_t terms[kMaxTerms];
  split_pair<kMaxTerms>(low, high, terms);
#pragma unroll
  for (int term = 0; term < kMaxTerms; ++term)
    if (term < out.count)
      out.data[terms_word(out.order, out.count, out.outer, out.inner, term, outer, inner)] = terms[term];
}

// The same of (outer, inner), (outer + 1, inner): halves of two words.
__device__ __forceinline__ void save_terms_across(const TermsOut& out, int64_t outer, int64_t inner, float low,
                                                  float high) {
  uint32_t terms[kMaxTerms];
  split_pair<kMaxTerms>(low, high, terms);
#pragma unroll
  for (int term = 0; term < kMaxTerms; ++term) {
    if (term >= out.count) continue;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t word = terms_word(out.order, out.count, out.outer, out.inner, term, outer + e, inner / 2 * 2);
      reinterpret_cast<uint16_t*>(out.data)[2 * word + inner % 2] = static_cast<uint16_t>(terms[term] >> 16 * e);
    }
  }
}

// C_n += A B_n of a 16 x 16 fragment A and kTiles of B, over the products of A's kLeft terms with B's term `right`,
// those whose sum of indices is below kTerms: what is left out is smaller than what kTerms terms can hold. A term's
// smallest products come first: a tensor core rounds toward zero, and would take up to an ulp of the large ones for
// each that follows them.
template <int kTiles, int kLeft, int kTerms>
__device__ __forceinline__ void mma_terms(float (&c)[kTiles][4], const uint32_t (&a)[kLeft][4],
                                          const uint32_t (&b)[kTiles][2], int right) {
#pragma unroll
  for (int i = kLeft - 1; i >= 0; --i) {
    if (i + right >= kTerms) continue;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) mma_m16n8k16<bf16>(c[n], a[i], b[n]);
  }
}

// The terms of in[o, i] · outer_scale[o] · inner_scale[i], for a matrix of any strides.
struct Split {
  const void* in;
  DType type;
  int64_t outer, inner, outer_stride, inner_stride;
  const float* outer_scale;  // null: 1
  const float* inner_scale;  // null: 1
  TermsOut out;
};

// One pair of each term, the pair-th along what is contiguous in the matrix.
__device__ __forceinline__ void split_pair_of(const Split& work, int64_t pair) {
  const int64_t pairs = work.out.inner / 2;
  if (pair >= work.out.outer * pairs) return;
  const bool along_inner = work.inner_stride == 1;
  const int64_t o = along_inner ? pair / pairs : pair % work.out.outer;
  const int64_t i = 2 * (along_inner ? pair % pairs : pair / work.out.outer);
  float values[2] = {0.0f, 0.0f};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (o >= work.outer || i + e >= work.inner) continue;
    float value = load_value(work.in, work.type, o * work.outer_stride + (i + e) * work.inner_stride);
    if (work.outer_scale != nullptr) value *= work.outer_scale[o];
    if (work.inner_scale != nullptr) value *= work.inner_scale[i + e];
    values[e] = value;
  }
  save_terms(work.out, o, i, values[0], values[1]);
}

constexpr int kMaxSplits = 3;
constexpr int kSplitThreads = 256;

// The small matrices of one call, in one launch: each alone would be all launch.
struct Splits {
  Split work[kMaxSplits];
};

}  // namespace peft_ext
