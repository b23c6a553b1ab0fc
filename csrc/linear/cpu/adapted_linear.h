// The one formula that every linear adapter here is, forward and backward, on the CPU:
//
//   x̃ = dropout(x)     S = x̃ Aᵀ [T, R]     Z = x Wᵀ + S (ρB)ᵀ [T, N]     Y = g ∘ (Z + b₀) + b₁
//
// and with drop_base, as PEFT's DoRA has it:  Z = x̃ Wᵀ + S (ρB)ᵀ,  Y = x Wᵀ + b₁ + g ∘ Z - x̃ Wᵀ. in_scale makes x l ∘
// x.
#pragma once

#include <optional>
#include <vector>

#include "weight/frozen_weight.h"
#include "common/philox.h"
#include "linear/cpu/grouped.h"
#include "linear/cpu/passes.h"

namespace peft_ext {

// Seed tensor and probability to what kernels take; inactive where there is no seed.
Dropout make_dropout(const char* op, double p, const std::optional<Tensor>& seed);

// What rides on the frozen product. The vectors are float32 and contiguous; ρ is scaling times rank_scale.
struct Adapter {
  std::optional<Tensor> lora_A, lora_B;  // [R, K], [N, R], each of its own type
  std::optional<Tensor> rank_scale;      // [R]
  double scaling = 1.0;
  Dropout dropout;
  bool drop_base = false;
  std::optional<Tensor> out_scale;  // g [N]
  std::optional<Tensor> in_scale;   // l [K]
  const Groups* groups = nullptr;   // instead of all the above: an adapter for each token. Forward only

  bool low_rank() const { return lora_A.has_value() || groups != nullptr; }
  int64_t rank() const { return groups != nullptr ? groups->rank : lora_A.has_value() ? lora_A->size(0) : 0; }
};

Adapter lora_adapter(const char* op, const Tensor& lora_A, const Tensor& lora_B,
                     const std::optional<Tensor>& rank_scale, double scaling, double dropout_p,
                     const std::optional<Tensor>& seed);

struct AdaptedForward {
  Tensor y;  // [..., N] of x's type
  Tensor s;  // [T, R] float32; [0] without a low-rank term
  Tensor z;  // Z + b₀ [T, N] of x's type; [0] where not asked for
};

// bias_inside: the bias is b₀, and b₁ otherwise. room: where the results go, contiguous, if not into memory of theirs.
AdaptedForward adapted_forward(const char* op, Tensor x, const FrozenWeight& weight, const std::optional<Tensor>& bias,
                               const Adapter& adapter, bool bias_inside, bool want_z,
                               const AdaptedForward* room = nullptr);

// A layer among those of one input.
struct Layer {
  FrozenWeight weight;
  std::optional<Tensor> bias;  // b₁
  Adapter adapter;             // without drop_base, in_scale and groups
};

// The forward of each, as adapted_forward has it, bit for bit. Where the tiles take them all, x is packed once, and the
// panels of all W are one work for the threads.
std::vector<AdaptedForward> adapted_forwards(const char* op, Tensor x, const std::vector<Layer>& layers);

struct AdaptedBackward {
  Tensor grad_x;           // x's shape; [0] where not asked for
  Tensor grad_A, grad_B;   // of lora_A's and lora_B's types
  Tensor grad_rank_scale;  // [R] float32; [0] without rank_scale
  Tensor grad_in_scale;    // [K] float32; [0] without in_scale
};

// dg [N] float32 of the output's scale: sum_t dY ∘ (Z + b₀). z [T, N] is that, or with z_is_scaled Y, where
// Y = g ∘ (Z + b₀): then the few outputs whose g is so small that Y holds too little of Z are computed again.
Tensor scale_gradient(const char* op, const Tensor& grad, const Tensor& x, const FrozenWeight& weight,
                      const Adapter& adapter, const std::optional<Tensor>& s, const Tensor& z, bool z_is_scaled,
                      const std::optional<Tensor>& bias_before);

// s as the forward gave it; x may be absent where there is neither a low-rank term nor in_scale. room: where dX goes,
// contiguous, if not into memory of its own.
AdaptedBackward adapted_backward(const char* op, Tensor grad, std::optional<Tensor> x, const FrozenWeight& weight,
                                 const Adapter& adapter, const std::optional<Tensor>& s, bool needs_grad_x,
                                 const std::optional<Tensor>& room = std::nullopt);

// dX of all layers together, summed before it is rounded where the tiles take them and their panels of W fit the cache,
// else added to what the layers before left; and each one's own gradients. Of a layer without a gradient there is none.
struct SiblingsBackward {
  Tensor grad_x;  // x's shape; [0] where not asked for
  std::vector<AdaptedBackward> layers;
};
SiblingsBackward adapted_backwards(const char* op, const std::vector<std::optional<Tensor>>& grads, Tensor x,
                                   const std::vector<Layer>& layers, const std::vector<Tensor>& s, bool needs_grad_x);

// Y = residual + S (ρB)ᵀ alone, over a base product that was made elsewhere; residual is of x's type.
AdaptedForward low_rank_forward(const char* op, Tensor x, const Tensor& residual, const Adapter& adapter);
AdaptedBackward low_rank_backward(const char* op, Tensor grad, Tensor x, const Adapter& adapter, const Tensor& s,
                                  bool needs_grad_x);

// dX = dY W alone, [..., K] of dY's type.
Tensor frozen_backward(const char* op, Tensor grad, const FrozenWeight& weight);

}  // namespace peft_ext
