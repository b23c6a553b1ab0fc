// The one formula that every linear adapter here is, forward and backward, on a GPU; linear/cpu/adapted_linear.h has it
// for the CPU, with the same meanings:
//
//   x̃ = dropout(x)     S = x̃ Aᵀ [T, R]     Z = x Wᵀ + S (ρB)ᵀ [T, N]     Y = g ∘ (Z + b₀) + b₁
//
// and with drop_base, as PEFT's DoRA has it:  Z = x̃ Wᵀ + S (ρB)ᵀ,  Y = x Wᵀ + b₁ + g ∘ Z - x̃ Wᵀ. in_scale makes x l ∘
// x. PyTorch's own product makes x Wᵀ and dY W, and adds them to what the kernels here have written; a few tokens
// against an NF4 weight take one kernel instead.
#pragma once

#include "weight/device_weight.cuh"

namespace peft_ext {

// What rides on the frozen product. The vectors are float32 and contiguous; ρ is scaling times rank_scale.
struct DeviceAdapter {
  std::optional<Tensor> lora_A, lora_B;  // [R, K], [N, R], each of its own type
  std::optional<Tensor> rank_scale;      // [R]
  double scaling = 1.0;
  double dropout_p = 0.0;
  std::optional<Tensor> seed;  // int64 [2]; none: no dropout
  bool drop_base = false;
  std::optional<Tensor> out_scale;  // g [N]
  std::optional<Tensor> in_scale;   // l [K]
};

DeviceAdapter lora_device_adapter(const char* op, const Tensor& lora_A, const Tensor& lora_B,
                                  const std::optional<Tensor>& rank_scale, double scaling, double dropout_p,
                                  const std::optional<Tensor>& seed);

struct DeviceForward {
  Tensor y;  // [..., N] of x's type
  Tensor s;  // [T, R] float32; [0] without a low-rank term
  Tensor z;  // Z + b₀ [T, N] of x's type; [0] where not asked for
};

// bias_inside: the bias is b₀, and b₁ otherwise.
DeviceForward adapted_forward(const char* op, const Tensor& x, const DeviceWeight& weight,
                              const std::optional<Tensor>& bias, const DeviceAdapter& adapter, bool bias_inside,
                              bool want_z);

// Several adapters in one batch.
struct DeviceGroups {
  std::vector<Tensor> lora_A, lora_B;  // those that a sample has, of at least one rank
  std::vector<double> scaling;         // of each
  std::vector<int64_t> adapters;       // of each sample: which, or -1 for none
  int64_t rank = 0;                    // the largest, of those that no sample has too
};

// Y_i = x_i Wᵀ + s_g S_i B_gᵀ + b and S_i = x_i A_gᵀ, g sample i's adapter; S is [T, groups.rank], zeros beyond a
// token's own ranks.
DeviceForward grouped_forward(const char* op, const Tensor& x, const DeviceWeight& weight,
                              const std::optional<Tensor>& bias, const DeviceGroups& groups);

struct DeviceBackward {
  Tensor grad_x;           // x's shape; [0] where not asked for
  Tensor grad_A, grad_B;   // of lora_A's and lora_B's types; unset without
  Tensor grad_rank_scale;  // [R] float32; [0] without rank_scale
  Tensor grad_in_scale;    // [K] float32; [0] without in_scale
  Tensor grad_out_scale;   // [N] float32; [0] where not asked for
};

// s and z as the forward gave them; z where the gradient of g is wanted, Σ_t dY ∘ (Z + b₀).
DeviceBackward adapted_backward(const char* op, const Tensor& grad, const Tensor& x, const DeviceWeight& weight,
                                const DeviceAdapter& adapter, const std::optional<Tensor>& s, bool needs_grad_x,
                                const std::optional<Tensor>& z);

// A layer among those of one input.
struct DeviceLayer {
  DeviceWeight weight;
  std::optional<Tensor> bias;  // b₁
  DeviceAdapter adapter;       // without drop_base, out_scale and in_scale
};

// dX of all layers together: their terms behind the dropout in one write, then each layer's product onto it; and each
// one's own gradients, each [0] where it has none. Of a layer without a gradient there is none.
struct DeviceSiblingsBackward {
  Tensor grad_x;  // x's shape; [0] where not asked for
  std::vector<DeviceBackward> layers;
};
DeviceSiblingsBackward adapted_backwards(const char* op, const std::vector<std::optional<Tensor>>& grads,
                                         const Tensor& x, const std::vector<DeviceLayer>& layers,
                                         const std::vector<Tensor>& s, bool needs_grad_x);

// Y = residual + S (ρB)ᵀ alone, over a base product that was made elsewhere; residual is of x's type.
DeviceForward low_rank_forward(const char* op, const Tensor& x, const Tensor& residual, const DeviceAdapter& adapter);
DeviceBackward low_rank_backward(const char* op, const Tensor& grad, const Tensor& x, const DeviceAdapter& adapter,
                                 const Tensor& s, bool needs_grad_x);

// dX = dY W alone, [..., K] of dY's type.
Tensor frozen_backward(const char* op, const Tensor& grad, const DeviceWeight& weight);

// m ∘ scale in m's type and shape, where scale [columns] float32 is given, and Σ_t m[t] ∘ other[t], [columns] float32,
// where other is; each is [0] otherwise. One pass over m.
struct ColumnProducts {
  Tensor scaled, sums;
};
ColumnProducts scale_columns(const Tensor& m, const std::optional<Tensor>& scale, const std::optional<Tensor>& other);

// The norms of W + s B A's rows [N], and U = W Aᵀ [N, R], float32; an NF4 weight is dequantized to `type`.
struct WeightNorm {
  Tensor norm, u;
};
WeightNorm weight_norm(const char* op, const DeviceWeight& weight, const Tensor& lora_A, const Tensor& lora_B,
                       double scaling, ScalarType type);

// Its gradients, of lora_A's and lora_B's types.
struct WeightNormGradient {
  Tensor grad_A, grad_B;
};
WeightNormGradient weight_norm_backward(const char* op, const Tensor& grad, const DeviceWeight& weight,
                                        const Tensor& lora_A, const Tensor& lora_B, const Tensor& norm, const Tensor& u,
                                        double scaling, ScalarType type);

}  // namespace peft_ext
