// Passes over activations and over W, on all threads; the arithmetic is in linear/cpu/kernels/kernels.h.
//
// Sums over tokens are made per chunk of tokens, whose number depends on T alone, and then added in order: the same
// bits for any number of threads.
#pragma once

#include "weight/frozen_weight.h"
#include "linear/cpu/packing.h"
#include "linear/cpu/kernels/kernels.h"

namespace peft_ext {

const PassKernels& pass_kernels();

RowPass make_row_pass(const Tensor& m, DType dtype, int64_t columns, int64_t rank, const Dropout& dropout);

// Runs a pass without `left` over all tokens.
void run_row_pass(const RowPass& pass, int64_t tokens);

// Runs a pass with `left` (null only where there are no tokens): its sums [columns, rank]; totals: if given, m's
// [columns].
Tensor run_outer_pass(const RowPass& pass, int64_t tokens, Tensor* totals = nullptr);

void run_expand(const Expand& work, int64_t tokens);

// The mask of dropout as bits.
struct KeepBits {
  Tensor words;  // int32 storage as float32: stable tensors of few types are made here
  int64_t per_row = 0;
  uint32_t* data = nullptr;
};

// Unset.
KeepBits keep_bits(int64_t tokens, int64_t columns);

// x̃ = mask ∘ x by dropout's scale, in x's type and shape; x is contiguous.
Tensor dropped_elements(const char* op, const Tensor& x, const Dropout& dropout);

// m ∘ (scale + shift) in m's type and shape, where scale [K] float32 is given, and sum_t m[t, k] other[t, k], [K]
// float32, where other is given; each is [0] otherwise. One pass over m.
struct ColumnSums {
  Tensor scaled, sums;
};
ColumnSums column_pass(const char* op, const Tensor& m, const Tensor* scale, float shift, const Tensor* other);

// y [T, N] (+)= x [T, K] wᵀ for at most kFewTokens tokens; x and y are float32, w [N, K] is contiguous.
void run_few_tokens(const char* op, const Tensor& w, const Tensor& x, const Tensor& y, bool accumulate);

// W Aᵀ [N, padded rank] and the sums of squares of W's rows [N], float32, W in `type`.
struct RowFacts {
  Tensor product, squares;
};
RowFacts weight_row_facts(const char* op, const FrozenWeight& weight, const Tensor& lora_A, ScalarType type);

// leftᵀ W: left [N, R] float32, the result [R, K] float32.
Tensor weight_outer(const char* op, const FrozenWeight& weight, const Tensor& left, ScalarType type);

}  // namespace peft_ext
