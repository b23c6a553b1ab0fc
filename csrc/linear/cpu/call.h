// Declares the state of one call of the adapted layer, and the low-rank functions that the whole layer and
// lora_residual share. See adapted_linear.h for the formula.
#pragma once

#include "linear/cpu/adapted_linear.h"

namespace peft_ext {

struct LinearSizes {
  int64_t tokens, in, out, rank;
};

// Returns the sizes of a call with x [tokens, columns]: tokens, inputs, outputs and rank. Raises an error if the size
// of x, lora_A or lora_B does not fit the weight.
LinearSizes checked_sizes(const char* op, int64_t tokens, int64_t columns, const FrozenWeight& weight,
                          const Adapter& adapter);
LinearSizes checked_sizes(const char* op, const Tensor& x, const FrozenWeight& weight, const Adapter& adapter);

// Raises an error if the layer's bias, if there is one, does not have a value for each output.
void check_bias(const char* op, const std::optional<Tensor>& bias, const LinearSizes& size);

// Returns ρ [R], the factors of the ranks: scaling times rank_scale.
Tensor rank_scales(const char* op, const Adapter& adapter);

// --- forward ---------------------------------------------------------------------------------------------------------

// The arguments and results of one call of the forward. forward.cpp describes the three ways in which y and z of `out`
// are computed.
struct ForwardCall {
  const char* op;
  const FrozenWeight& weight;
  const Adapter& adapter;
  LinearSizes size;
  Tensor x;  // [T, K], contiguous
  bool bias_inside, want_z;
  std::optional<Tensor> bias, scale;  // bias and g in float32, zero-padded to a multiple of kColumnStep elements
  AdaptedForward out;

  ScalarType type() const { return x.scalar_type(); }
  DType dtype() const { return dtype_of(op, "x", x); }
  bool drop_base() const { return adapter.drop_base && adapter.dropout.active; }
};

// Returns the arguments of the final pass (Expand in kernels.h), which computes Y and Z from the base product. The
// caller still has to set the low-rank term in the arguments.
Expand finishing(const ForwardCall& f);

// The results of shrink_tokens in addition to ForwardCall::out.s: `keep` has the bits of the dropout mask if
// drop_base() is true and the batch is not mixed.
struct Shrunk {
  KeepBits keep;
  GroupedS grouped;  // S of a mixed batch; a segment's rows of S are as long as the rank of the segment's adapter
};

// Returns the pass over x that computes S with A [R, K] float32, and writes S to ForwardCall::out.s. keep: receives, if
// drop_base() is true (dropout acts on the base product too), the memory into which the pass writes the bits of the
// dropout mask.
RowPass shrink_pass(const ForwardCall& f, const Tensor& a, KeepBits* keep);

// Computes S in one pass over x, and writes S to ForwardCall::out.s.
Shrunk shrink_tokens(const ForwardCall& f);

// --- backward --------------------------------------------------------------------------------------------------------

// The arguments and intermediate results of one call of the backward. The gradients of lora_A, lora_B and rank_scale
// are computed first. Then dX and the gradient of in_scale are computed in one of the two ways that backward.cpp
// describes.
struct BackwardCall {
  const char* op;
  const FrozenWeight& weight;
  const Adapter& adapter;
  LinearSizes size;
  Tensor grad, x;  // grad is dY [T, N], x is [T, K]; both are contiguous
  // P = (g ∘ dY) ρB [T rounded up to 32, R]; kernels read the rows beyond T, but store no results of these rows.
  Tensor p;
  KeepBits keep;  // bits of the dropout mask, if dropout is active and dX is wanted
  // If the tile kernels compute dX, rank_gradients also makes the strips (see tiles.h) of lora_A and, if `strips` is
  // not null, the left strips of g ∘ dY, or of dY if dropout acts on the base.
  bool tiles = false;
  Tensor a;
  bf16* strips = nullptr;

  ScalarType type() const { return x.scalar_type(); }
  DType dtype() const { return dtype_of(op, "x", x); }
  bool mask() const { return adapter.dropout.active && adapter.low_rank(); }
  bool drop_base() const { return adapter.drop_base && mask(); }
  const float* g() const { return floats(adapter.out_scale); }
};

// Checks a call of the backward. held_x must be contiguous. The result refers to op, weight and adapter, which must
// outlive the result.
BackwardCall checked_backward(const char* op, const FrozenWeight& weight, const Adapter& adapter, const Tensor& grad,
                              const Tensor& held_x);

// The arguments of rank_gradients for one layer: s is S of the forward, and out receives the gradients.
struct RankCall {
  BackwardCall* call;
  const std::optional<Tensor>* s;
  AdaptedBackward* out;
};

// Computes for each layer P = (g ∘ dY) ρB, dB and the gradient of rank_scale from dY and S, and dA from x and P. If dX
// is wanted and dropout is active, the function also computes the bits of the dropout mask for dX. All layers are
// computed in the same parallel loops.
void rank_gradients(const std::vector<RankCall>& calls, bool needs_grad_x);

// Sets the arguments of `finish` so that run_expand computes dX = mask/(1-p) ∘ (P A). The caller of behind_dropout adds
// further terms to `finish`. Returns the tensor that holds A in float32, to which `finish` points, or an undefined
// tensor if there is no low-rank term.
Tensor behind_dropout(const BackwardCall& b, Expand* finish, AdaptedBackward* out);

}  // namespace peft_ext
