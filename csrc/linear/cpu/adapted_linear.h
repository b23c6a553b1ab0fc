// The formula of all adapted linear layers, forward and backward, on the CPU:
//
//   x̃ = dropout(x)     S = x̃ Aᵀ [T, R]     Z = x Wᵀ + S (ρB)ᵀ [T, N]     Y = g ∘ (Z + b₀) + b₁
//
// With drop_base, as in PEFT's DoRA:  Z = x̃ Wᵀ + S (ρB)ᵀ,  Y = x Wᵀ + b₁ + g ∘ Z - x̃ Wᵀ. With in_scale l, the base
// product takes l ∘ x instead of x. An absent term is left out: g = l = 1, b₀ = b₁ = 0, no S.
#pragma once

#include <optional>
#include <vector>

#include "weight/frozen_weight.h"
#include "common/philox.h"
#include "linear/cpu/grouped.h"
#include "linear/cpu/passes.h"

namespace peft_ext {

// Makes the kernels' parameters of dropout from a probability and a seed tensor. Without a seed dropout is inactive.
Dropout make_dropout(const char* op, double p, const std::optional<Tensor>& seed);

// The adapter of a frozen linear layer. Vectors are float32 and contiguous. ρ is scaling times rank_scale.
struct Adapter {
  std::optional<Tensor> lora_A, lora_B;  // [R, K] and [N, R]; the two dtypes may differ
  std::optional<Tensor> rank_scale;      // [R]
  double scaling = 1.0;
  Dropout dropout;
  bool drop_base = false;
  std::optional<Tensor> out_scale;  // g [N]
  std::optional<Tensor> in_scale;   // l [K]
  const Groups* groups = nullptr;   // an adapter per token, instead of all fields above; only in the forward

  bool low_rank() const { return lora_A.has_value() || groups != nullptr; }
  int64_t rank() const { return groups != nullptr ? groups->rank : lora_A.has_value() ? lora_A->size(0) : 0; }
};

Adapter lora_adapter(const char* op, const Tensor& lora_A, const Tensor& lora_B,
                     const std::optional<Tensor>& rank_scale, double scaling, double dropout_p,
                     const std::optional<Tensor>& seed);

struct AdaptedForward {
  Tensor y;  // [..., N] of x's dtype
  Tensor s;  // [T, R] float32, or [0] without a low-rank term
  Tensor z;  // Z + b₀ [T, N] of x's dtype, or [0] unless want_z
};

// Computes the forward. bias_inside: the bias is b₀, otherwise b₁. room: contiguous tensors for the results, or null.
AdaptedForward adapted_forward(const char* op, Tensor x, const FrozenWeight& weight, const std::optional<Tensor>& bias,
                               const Adapter& adapter, bool bias_inside, bool want_z,
                               const AdaptedForward* room = nullptr);

// One of several layers with one input.
struct Layer {
  FrozenWeight weight;
  std::optional<Tensor> bias;  // b₁
  Adapter adapter;             // an adapter without drop_base, in_scale and groups
};

// Computes the forward of each layer, with the bits of adapted_forward. If the tiles accept all layers, x is packed
// once, and the panels of all weights are shared among the threads as one list.
std::vector<AdaptedForward> adapted_forwards(const char* op, Tensor x, const std::vector<Layer>& layers);

struct AdaptedBackward {
  Tensor grad_x;           // x's shape, or [0] unless asked for
  Tensor grad_A, grad_B;   // in the dtypes of lora_A and lora_B
  Tensor grad_rank_scale;  // [R] float32, or [0] without rank_scale
  Tensor grad_in_scale;    // [K] float32, or [0] without in_scale
};

// Returns dg [N] float32, the gradient of the output scale: sum_t dY ∘ (Z + b₀). z [T, N] is Z + b₀, or with
// z_is_scaled Y = g ∘ (Z + b₀). Where g is too small to recover Z from Y, Z is computed again.
Tensor scale_gradient(const char* op, const Tensor& grad, const Tensor& x, const FrozenWeight& weight,
                      const Adapter& adapter, const std::optional<Tensor>& s, const Tensor& z, bool z_is_scaled,
                      const std::optional<Tensor>& bias_before);

// Computes the backward. s is the forward's S. x may be absent without a low-rank term and without in_scale. room: a
// contiguous tensor for dX, or nullopt.
AdaptedBackward adapted_backward(const char* op, Tensor grad, std::optional<Tensor> x, const FrozenWeight& weight,
                                 const Adapter& adapter, const std::optional<Tensor>& s, bool needs_grad_x,
                                 const std::optional<Tensor>& room = std::nullopt);

// Result of the backward of several layers with one input: the sum of all dX, and each layer's own gradients. If the
// tiles accept the layers and their panels of W fit the cache, the sum is rounded once. Otherwise each layer's dX is
// added to the rounded sum of the layers before. A layer without dY has no gradients.
struct SiblingsBackward {
  Tensor grad_x;  // x's shape, or [0] unless asked for
  std::vector<AdaptedBackward> layers;
};
SiblingsBackward adapted_backwards(const char* op, const std::vector<std::optional<Tensor>>& grads, Tensor x,
                                   const std::vector<Layer>& layers, const std::vector<Tensor>& s, bool needs_grad_x);

// Computes Y = residual + S (ρB)ᵀ. residual is the output of another base layer, in x's dtype.
AdaptedForward low_rank_forward(const char* op, Tensor x, const Tensor& residual, const Adapter& adapter);
AdaptedBackward low_rank_backward(const char* op, Tensor grad, Tensor x, const Adapter& adapter, const Tensor& s,
                                  bool needs_grad_x);

// Returns dX = dY W, [..., K] in dY's dtype.
Tensor frozen_backward(const char* op, Tensor grad, const FrozenWeight& weight);

}  // namespace peft_ext
