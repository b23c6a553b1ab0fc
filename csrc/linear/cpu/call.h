// One call of the adapted layer as its parts see it, and the low-rank work that the whole layer and the low-rank term
// alone (lora_residual) share. See adapted_linear.h for the formula.
#pragma once

#include "linear/cpu/adapted_linear.h"

namespace peft_ext {

struct LinearSizes {
  int64_t tokens, in, out, rank, padded;
};

// The sizes of a call; an error where x, lora_A or lora_B do not have those of the weight.
LinearSizes checked_sizes(const char* op, const Tensor& x, const FrozenWeight& weight, const Adapter& adapter);

// ρ [padded rank], zeros beyond the rank.
Tensor rank_scales(const char* op, const Adapter& adapter, int64_t padded);

// --- forward ---------------------------------------------------------------------------------------------------------

// One call. y, s and z of `out` are written by one of the three ways below.
struct ForwardCall {
  const char* op;
  const FrozenWeight& weight;
  const Adapter& adapter;
  LinearSizes size;
  Tensor x;  // [T, K], contiguous
  bool bias_inside, want_z;
  std::optional<Tensor> bias, scale;  // float32, padded to kColumnStep
  AdaptedForward out;

  ScalarType type() const { return x.scalar_type(); }
  DType dtype() const { return dtype_of(op, "x", x); }
  bool drop_base() const { return adapter.drop_base && adapter.dropout.active; }
};

// The pass that makes Y and Z of what a product left, but for the low-rank term.
Expand finishing(const ForwardCall& f);

// S [T, padded rank], into out.s too, and where the base is dropped as well the mask's bits.
struct Shrunk {
  Tensor s;
  KeepBits keep;
  GroupedS grouped;  // instead
};

// S, by a pass over x.
Shrunk shrink_tokens(const ForwardCall& f);

// y [T, N] float32 (+)= the low-rank term of x [T, K], in float32.
void few_tokens_low_rank(const ForwardCall& f, const Tensor& x, const Tensor& y, bool accumulate);

// --- backward --------------------------------------------------------------------------------------------------------

// One call. The gradients of the adapter come first, then dX by one of two ways.
struct BackwardCall {
  const char* op;
  const FrozenWeight& weight;
  const Adapter& adapter;
  LinearSizes size;
  Tensor grad, x;  // [T, N], [T, K], contiguous
  Tensor p;        // [T rounded up to 32, padded rank]; what is beyond the last token is multiplied and not stored
  KeepBits keep;   // where a mask acts and dX is wanted

  ScalarType type() const { return x.scalar_type(); }
  DType dtype() const { return dtype_of(op, "x", x); }
  bool mask() const { return adapter.dropout.active && adapter.low_rank(); }
  bool drop_base() const { return adapter.drop_base && mask(); }
  const float* g() const { return floats(adapter.out_scale); }
};

// held_x: contiguous; it and what else is referred to must live as long.
BackwardCall checked_backward(const char* op, const FrozenWeight& weight, const Adapter& adapter, const Tensor& grad,
                              const Tensor& held_x);

// P, dB and the rank scale's gradient from dY; dA from x and P; and the mask's bits for dX.
void rank_gradients(BackwardCall* call, const std::optional<Tensor>& s, bool needs_grad_x, AdaptedBackward* out);

// dX = mask/(1-p) ∘ (P A) and what the caller adds; returns what `finish` points to.
Tensor behind_dropout(const BackwardCall& b, Expand* finish, AdaptedBackward* out);

}  // namespace peft_ext
