// Declares the forward and the backward of the adapted linear layer on the CPU. The formula:
//
//   x̃ = dropout(x)     S = x̃ Aᵀ [T, R]     Z = x Wᵀ + S (ρB)ᵀ [T, N]     Y = g ∘ (Z + b₀) + b₁
//
// x is [T, K], the frozen weight W is [N, K], A and B are lora_A [R, K] and lora_B [N, R], ρ [R] is scaling times
// rank_scale, and g [N] is the output scale of DoRA or IA3. `mask` is the dropout mask, which is 1 for a kept element.
//
// With drop_base (dropout acts on the base product too, as in PEFT's DoRA), Z = x̃ Wᵀ + S (ρB)ᵀ, Y = x Wᵀ + b₁ + g ∘ Z
// - x̃ Wᵀ. With in_scale l, the base product is (l ∘ x) Wᵀ instead of x Wᵀ. A term that the caller does not give is
// left out: a missing g, l or rank_scale counts as 1, a missing b₀ or b₁ counts as 0, and S is computed only if there
// is an adapter.
#pragma once

#include <optional>
#include <vector>

#include "weight/frozen_weight.h"
#include "common/philox.h"
#include "linear/cpu/grouped.h"
#include "linear/cpu/passes.h"

namespace peft_ext {

// Makes the kernels' parameters of dropout from a probability and a seed tensor. If there is no seed, dropout is
// inactive.
Dropout make_dropout(const char* op, double p, const std::optional<Tensor>& seed);

// The operands that an adapter adds to a frozen linear layer on the CPU: the factors of the low-rank term, the scales,
// and dropout. out_scale and in_scale are float32 and contiguous. ρ, the factors of the ranks, is scaling times
// rank_scale.
struct Adapter {
  std::optional<Tensor> lora_A, lora_B;  // lora_A is [R, K], lora_B is [N, R]; the two dtypes may differ
  std::optional<Tensor> rank_scale;      // [R]
  double scaling = 1.0;
  Dropout dropout;
  bool drop_base = false;
  std::optional<Tensor> out_scale;  // g [N]
  std::optional<Tensor> in_scale;   // l [K]
  const Groups* groups = nullptr;   // adapters of a mixed batch, in place of lora_A and lora_B; else null

  bool low_rank() const { return lora_A.has_value() || groups != nullptr; }
  int64_t rank() const { return groups != nullptr ? groups->rank : lora_A.has_value() ? lora_A->size(0) : 0; }
};

Adapter lora_adapter(const char* op, const Tensor& lora_A, const Tensor& lora_B,
                     const std::optional<Tensor>& rank_scale, double scaling, double dropout_p,
                     const std::optional<Tensor>& seed);

struct AdaptedForward {
  Tensor y;  // Y, [..., N] of x's dtype
  Tensor s;  // S, [T, R] float32; shape [0] if there is no low-rank term
  Tensor z;  // Z + b₀, [T, N] of x's dtype; shape [0] if want_z is false
};

// Computes the forward of the adapted linear layer. If bias_inside is true, `bias` is b₀, which g scales; otherwise
// `bias` is b₁, which g does not scale. room: contiguous tensors that receive y, s and z; if room is null,
// adapted_forward allocates y, s and z.
AdaptedForward adapted_forward(const char* op, Tensor x, const FrozenWeight& weight, const std::optional<Tensor>& bias,
                               const Adapter& adapter, bool bias_inside, bool want_z,
                               const AdaptedForward* room = nullptr);

// One of several layers that have the same input x.
struct Layer {
  FrozenWeight weight;
  std::optional<Tensor> bias;  // b₁
  Adapter adapter;             // the layer's adapter, in which drop_base, in_scale and groups must not be set
};

// Computes the forward of several layers with the same input x. Each layer's results have the same bits as the results
// of adapted_forward for this layer. For the layers that the tile kernels (tiles/tiles.h) accept, x is converted to
// strips once, and the panels of these layers' weights are divided among the threads as one list.
std::vector<AdaptedForward> adapted_forwards(const char* op, Tensor x, const std::vector<Layer>& layers);

struct AdaptedBackward {
  Tensor grad_x;           // dX in x's shape; shape [0] if needs_grad_x is false
  Tensor grad_A, grad_B;   // gradients of lora_A and lora_B, in their dtypes; shape [0] if lora_A is missing
  Tensor grad_rank_scale;  // gradient of rank_scale, [R] float32; shape [0] if rank_scale is missing
  Tensor grad_in_scale;    // gradient of in_scale, [K] float32; shape [0] if in_scale is missing
};

// Returns dg [N] float32, the gradient of the output scale g: the sum of dY ∘ (Z + b₀) over the tokens. z [T, N] is Z +
// b₀, or, if z_is_scaled is true, Y = g ∘ (Z + b₀). If z_is_scaled is true, Z + b₀ is computed again for the outputs
// whose g is too small to recover Z + b₀ from Y.
Tensor scale_gradient(const char* op, const Tensor& grad, const Tensor& x, const FrozenWeight& weight,
                      const Adapter& adapter, const std::optional<Tensor>& s, const Tensor& z, bool z_is_scaled,
                      const std::optional<Tensor>& bias_before);

// Computes the backward of the adapted linear layer. s is S from the forward. x may be nullopt if the layer has neither
// a low-rank term nor in_scale. room: a contiguous tensor that receives dX; if room is nullopt, adapted_backward
// allocates dX.
AdaptedBackward adapted_backward(const char* op, Tensor grad, std::optional<Tensor> x, const FrozenWeight& weight,
                                 const Adapter& adapter, const std::optional<Tensor>& s, bool needs_grad_x,
                                 const std::optional<Tensor>& room = std::nullopt);

// Result of the backward of several layers with the same input: the sum of all dX, and each layer's own gradients. If
// the tile kernels accept all layers, the layers' panels of W fit the cache together and there are at most kMostLayers
// layers, each element of the sum is rounded to dX's dtype once. If the layers cannot be computed together and there
// are two or more layers, the dX of some layers is added to the sum of the previous layers, which is already rounded to
// dX's dtype. A layer whose dY is missing adds nothing to dX, and all of its gradients have shape [0].
struct SiblingsBackward {
  Tensor grad_x;  // dX in x's shape; shape [0] if needs_grad_x is false
  std::vector<AdaptedBackward> layers;
};
SiblingsBackward adapted_backwards(const char* op, const std::vector<std::optional<Tensor>>& grads, Tensor x,
                                   const std::vector<Layer>& layers, const std::vector<Tensor>& s, bool needs_grad_x);

// Computes Y = residual + S (ρB)ᵀ. residual is the output of a base layer that the operator does not compute, in x's
// dtype.
AdaptedForward low_rank_forward(const char* op, Tensor x, const Tensor& residual, const Adapter& adapter);
AdaptedBackward low_rank_backward(const char* op, Tensor grad, Tensor x, const Adapter& adapter, const Tensor& s,
                                  bool needs_grad_x);

// Returns dX = dY W, [..., K] in dY's dtype.
Tensor frozen_backward(const char* op, Tensor grad, const FrozenWeight& weight);

}  // namespace peft_ext
