// Declares passes over activations and over W, which run on all threads. The kernels are in
// linear/cpu/kernels/kernels.h.
//
// Sums over tokens are computed per chunk of tokens, and the chunks' sums are added in order. The number of chunks
// depends only on the number of tokens, so that a sum has the same bits for every number of threads.
#pragma once

#include "weight/frozen_weight.h"
#include "linear/cpu/packing.h"
#include "linear/cpu/kernels/kernels.h"

namespace peft_ext {

const PassKernels& pass_kernels();

RowPass make_row_pass(const Tensor& m, DType dtype, int64_t columns, int64_t rank, const Dropout& dropout);

// A function that the threads call for the tokens [first, last) in the parallel loop of a pass. `first` is a multiple
// of kTokenStep.
using TokenWork = std::function<void(int64_t first, int64_t last)>;

// Runs passes whose `left` is null over all tokens; all passes have the same matrix RowPass::m. beside: null, or a
// function that a thread calls after the passes over some tokens, for these tokens; for one token the function takes as
// long as beside_work multiplications.
void run_row_passes(const std::vector<RowPass>& passes, int64_t tokens, const TokenWork& beside, int64_t beside_work);
void run_row_pass(const RowPass& pass, int64_t tokens);

// Runs a pass with `left` (which may be null if there are no tokens) and returns the pass's sums leftᵀ · m [rank,
// columns]. totals: receives the sums of m's columns, [columns]; may be null.
Tensor run_outer_pass(const RowPass& pass, int64_t tokens, Tensor* totals = nullptr);

// Runs a pass with `left`, or adds a part of the pass to the loops `later`, which the caller runs with a grain of at
// least kPassGrain. When outer_pass returns, m · right is complete. leftᵀ · m is complete after the caller has run the
// loops and has done the additions that the returned LateSums describes. beside: null, or a function that is called for
// all tokens in the parallel loop of a pass with `right`. The sums of m's columns in `totals` are complete after the
// caller has run the loops.
LateSums outer_pass(Loops* later, const RowPass& pass, int64_t tokens, Tensor* totals, const TokenWork& beside);

// Does the additions that `sums` describes (see LateSums), in order, and returns the total.
Tensor summed(LateSums* sums);

void run_expand(const Expand& work, int64_t tokens);

// The bits of a dropout mask, one for each element of a matrix of tokens.
struct KeepBits {
  Tensor words;  // 32-bit words of the mask; the tensor has the dtype float32, but holds bits
  int64_t per_row = 0;
  uint32_t* data = nullptr;
};

// Allocates uninitialized words for the bits of a dropout mask [tokens, columns].
KeepBits keep_bits(int64_t tokens, int64_t columns);

// Computes the flat elements [0, count) of `work` on all threads.
void drop_elements(const DropElements& work, int64_t count);

// Returns x̃ = mask ∘ x times dropout's scale, in x's dtype and shape. x is contiguous.
Tensor dropped_elements(const char* op, const Tensor& x, const Dropout& dropout);

// Results of column_pass, which makes one pass over m. scaled: m ∘ (scale + shift) in the dtype and shape of m [...,
// K]; [0] if scale [K] is null. sums: float32 [K], sum_t m[t, k] other[t, k]; [0] if other is null.
struct ColumnSums {
  Tensor scaled, sums;
};
ColumnSums column_pass(const char* op, const Tensor& m, const Tensor* scale, float shift, const Tensor* other);

// Computes y = x wᵀ [T, N] for few tokens x [T, K], or y += x wᵀ if `accumulate` is true. x and y are float32, and w
// [N, K] is contiguous.
void run_few_tokens(const char* op, const Tensor& w, const Tensor& x, const Tensor& y, bool accumulate);

// Returns W Aᵀ [N, R] and the sum of squares of each row of W, float32 [N]. A dense W has the dtype `type`; a packed W
// is decoded to `type`.
struct RowFacts {
  Tensor product, squares;
};
RowFacts weight_row_facts(const char* op, const FrozenWeight& weight, const Tensor& lora_A, ScalarType type);

// Returns leftᵀ W, float32 [R, K], for left [N, R] float32.
Tensor weight_outer(const char* op, const FrozenWeight& weight, const Tensor& left, ScalarType type);

}  // namespace peft_ext
