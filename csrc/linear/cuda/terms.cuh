// Splits a float into bfloat16 terms, whose sum is nearly the float, so that tensor cores compute products with float32
// precision.
//
// v = v₀ + v₁ + v₂, where v_i is the bfloat16 nearest to v - v₀ - … - v_{i-1}. Each term has 8 significant bits and the
// exponent range of float32. A bfloat16 value has one term, a float16 value two, and a float32 value three. A kernel
// that multiplies two sums of terms computes only the products of term i and term j with i + j <= 2; the omitted
// products are below 2⁻²⁴ of the whole product. If the sum is rounded to 16 bits at once, two terms and the products
// with i + j <= 1 are enough: the omitted products are below 2⁻¹⁶ of the whole product.
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

// Splits each of two floats into kTerms bfloat16 terms, whose sum is nearly the float. Each word of `terms` has a term
// of `low` in its low half and the term of `high` in its high half.
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

// Selects the order in which the bfloat16 terms of a small matrix are stored. In each order, the fragments of one
// operand of mma.sync lie one after the other: a lane of a warp loads 16 adjacent bytes, and the 512 bytes that the 32
// lanes load are contiguous. In the order kPass, all terms of a tile of 64 x 64 elements are contiguous, too.
enum class TermsOrder : int {
  // Operand B of mma.sync in a rank pass, the factor F or L of rank_pass.cuh: outer = ranks, inner = the dimension that
  // is summed. Of the 16 bytes that a lane loads, the first 8 belong to a step of 16 values of `inner`, and the last 8
  // to the next step.
  kPass,
  // Operand A of mma.sync in expand_kernel, the factor L of expand.cuh: outer = rows, inner = ranks.
  kLeft,
  // Operand B of mma.sync in expand_kernel, the factor F of expand.cuh: outer = columns of the result, inner = ranks.
  // Of the 16 bytes that a lane loads, the first 8 belong to a tile of 8 columns, and the last 8 to the next tile.
  kRight,
};

// The bfloat16 terms of a small matrix [outer, inner], zero-padded. `inner` is the summed dimension, padded to a
// multiple of 16 (in the order kPass: of 64). `outer` is padded to 16, to 32, or to a multiple of 64 (in the orders
// kLeft and kRight: always to a multiple of 64).
struct Terms {
  const uint4* data = nullptr;
  int count = 0;
  int64_t outer = 0;  // padded size
  int64_t inner = 0;  // padded size
  TermsOrder order = TermsOrder::kPass;
};

// Number of 4-byte words in a fragment of 8 values of `outer` and 16 values of `inner`. Each word is a pair of terms
// along `inner`.
constexpr int kFragmentWords = 64;

// Returns the offset, in words of 4 bytes, of the word that holds term number `term` of the elements (outer, inner) and
// (outer, inner + 1). count: number of bfloat16 terms of the matrix.
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
  const int64_t column = outer % 64, tile = column % 8 / 2;  // g: row, in F's tile of 8 rows, of this column
  const int64_t g = column % 32 / 8 * 2 + column % 2;
  const int64_t fragment =
      ((outer / 64 * (inner_padded / 16) + inner / 16) * count + term) * 4 + column / 32 * 2 + tile / 2;
  return fragment * (2 * kFragmentWords) + (g * 4 + t) * 4 + tile % 2 * 2 + upper;
}

// The memory to which a kernel writes the terms of a small matrix.
struct TermsOut {
  uint32_t* data = nullptr;  // memory for the terms; null: no terms are written
  int count = 0;
  int64_t outer = 0, inner = 0;  // padded sizes
  TermsOrder order = TermsOrder::kPass;
};

// Writes the terms of the elements (outer, inner) and (outer, inner + 1), which share words.
__device__ __forceinline__ void save_terms(const TermsOut& out, int64_t outer, int64_t inner, float low, float high) {
  uint32_t terms[kMaxTerms];
  split_pair<kMaxTerms>(low, high, terms);
#pragma unroll
  for (int term = 0; term < kMaxTerms; ++term)
    if (term < out.count)
      out.data[terms_word(out.order, out.count, out.outer, out.inner, term, outer, inner)] = terms[term];
}

// Writes the terms of the elements (outer, inner) and (outer + 1, inner), which are halves of different words.
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

// Adds A B_n to C_n, for a 16 x 16 fragment A and kTiles fragments B_n. The function multiplies those of A's kLeft
// terms with B's term `right` for which the sum of the two indices is below kTerms; the omitted products are smaller
// than kTerms terms can represent. The smallest products are added first, because a tensor core rounds toward zero:
// adding a small product after a large product could cause an error of up to an ulp of the large product.
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

// Arguments of splitting one matrix, with any strides, into terms: `out` receives the terms of in[o, i] ·
// outer_scale[o] · inner_scale[i].
struct Split {
  const void* in;
  DType type;
  int64_t outer, inner, outer_stride, inner_stride;
  const float* outer_scale;  // factors of the outer dimension [outer]; null: all factors are 1
  const float* inner_scale;  // factors of the inner dimension [inner]; null: all factors are 1
  TermsOut out;
};

// Writes all bfloat16 terms of pair number `pair` of the matrix; the two elements of a pair are adjacent along `inner`.
// Pairs are counted along the contiguous dimension of the matrix.
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

constexpr int kMaxSplits = 24;
constexpr int kSplitThreads = 256;

// The small matrices that one launch of split_kernel splits, at most three for each layer of a call. One launch splits
// many matrices, because a launch takes longer than splitting a matrix.
struct Splits {
  Split work[kMaxSplits];
};

}  // namespace peft_ext
