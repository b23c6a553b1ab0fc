// The formula of all adapted linear layers, forward and backward, on CUDA. linear/cpu/adapted_linear.h has the formula
// for the CPU, with the same names:
//
//   x̃ = dropout(x)     S = x̃ Aᵀ [T, R]     Z = x Wᵀ + S (ρB)ᵀ [T, N]     Y = g ∘ (Z + b₀) + b₁
//
// With drop_base, as in PEFT's DoRA:  Z = x̃ Wᵀ + S (ρB)ᵀ,  Y = x Wᵀ + b₁ + g ∘ Z - x̃ Wᵀ. With in_scale l, the layer
// takes l ∘ x instead of x. PyTorch's matrix product computes x Wᵀ and dY W and adds them to the kernels' results. Few
// tokens against an NF4 weight are computed by kernels alone.
#pragma once

#include "weight/device_weight.cuh"

namespace peft_ext {

// The adapter of a frozen linear layer. Vectors are float32 and contiguous. ρ is scaling times rank_scale.
struct DeviceAdapter {
  std::optional<Tensor> lora_A, lora_B;  // [R, K] and [N, R]; the two dtypes may differ
  std::optional<Tensor> rank_scale;      // [R]
  double scaling = 1.0;
  double dropout_p = 0.0;
  std::optional<Tensor> seed;  // int64 [2], or nullopt without dropout
  bool drop_base = false;
  std::optional<Tensor> out_scale;  // g [N]
  std::optional<Tensor> in_scale;   // l [K]
};

DeviceAdapter lora_device_adapter(const char* op, const Tensor& lora_A, const Tensor& lora_B,
                                  const std::optional<Tensor>& rank_scale, double scaling, double dropout_p,
                                  const std::optional<Tensor>& seed);

struct DeviceForward {
  Tensor y;  // [..., N] of x's dtype
  Tensor s;  // [T, R] float32, or [0] without a low-rank term
  Tensor z;  // Z + b₀ [T, N] of x's dtype, or [0] unless want_z
};

// Computes the forward. bias_inside: the bias is b₀, otherwise b₁.
DeviceForward adapted_forward(const char* op, const Tensor& x, const DeviceWeight& weight,
                              const std::optional<Tensor>& bias, const DeviceAdapter& adapter, bool bias_inside,
                              bool want_z);

// Several adapters for the samples of one batch.
struct DeviceGroups {
  std::vector<Tensor> lora_A, lora_B;  // adapters that a sample uses, each of rank 1 or more
  std::vector<double> scaling;         // scaling of each adapter
  std::vector<int64_t> adapters;       // index of each sample's adapter, or -1 for none
  int64_t rank = 0;                    // the largest rank, unused adapters included
};

// Computes Y_i = x_i Wᵀ + s_g S_i B_gᵀ + b and S_i = x_i A_gᵀ, where g is the adapter of sample i. S is
// [T, groups.rank], with zeros beyond the rank of a token's adapter.
DeviceForward grouped_forward(const char* op, const Tensor& x, const DeviceWeight& weight,
                              const std::optional<Tensor>& bias, const DeviceGroups& groups);

struct DeviceBackward {
  Tensor grad_x;           // x's shape, or [0] unless asked for
  Tensor grad_A, grad_B;   // in the dtypes of lora_A and lora_B; unset without adapter
  Tensor grad_rank_scale;  // [R] float32, or [0] without rank_scale
  Tensor grad_in_scale;    // [K] float32, or [0] without in_scale
  Tensor grad_out_scale;   // [N] float32, or [0] unless asked for
};

// Computes the backward. s and z are the forward's. z is needed for the gradient of g, Σ_t dY ∘ (Z + b₀).
DeviceBackward adapted_backward(const char* op, const Tensor& grad, const Tensor& x, const DeviceWeight& weight,
                                const DeviceAdapter& adapter, const std::optional<Tensor>& s, bool needs_grad_x,
                                const std::optional<Tensor>& z);

// One of several layers with one input.
struct DeviceLayer {
  DeviceWeight weight;
  std::optional<Tensor> bias;  // b₁
  DeviceAdapter adapter;       // an adapter without drop_base, out_scale and in_scale
};

// Result of the backward of several layers with one input. dX is the sum over the layers: one write of all dropped
// low-rank terms, onto which each layer's product is added. A gradient that a layer lacks is [0]. A layer without dY
// has no gradients.
struct DeviceSiblingsBackward {
  Tensor grad_x;  // x's shape, or [0] unless asked for
  std::vector<DeviceBackward> layers;
};
DeviceSiblingsBackward adapted_backwards(const char* op, const std::vector<std::optional<Tensor>>& grads,
                                         const Tensor& x, const std::vector<DeviceLayer>& layers,
                                         const std::vector<Tensor>& s, bool needs_grad_x);

// Computes Y = residual + S (ρB)ᵀ. residual is the output of another base layer, in x's dtype.
DeviceForward low_rank_forward(const char* op, const Tensor& x, const Tensor& residual, const DeviceAdapter& adapter);
DeviceBackward low_rank_backward(const char* op, const Tensor& grad, const Tensor& x, const DeviceAdapter& adapter,
                                 const Tensor& s, bool needs_grad_x);

// Returns dX = dY W, [..., K] in dY's dtype.
Tensor frozen_backward(const char* op, const Tensor& grad, const DeviceWeight& weight);

// One pass over m. scaled: m ∘ scale in m's dtype and shape, or [0] without scale [columns] float32. sums: float32
// [columns], Σ_t m[t] ∘ other[t], or [0] without other.
struct ColumnProducts {
  Tensor scaled, sums;
};
ColumnProducts scale_columns(const Tensor& m, const std::optional<Tensor>& scale, const std::optional<Tensor>& other);

// The norm of each row of W + s B A, [N], and U = W Aᵀ [N, R], float32. An NF4 weight is dequantized to `type`.
struct WeightNorm {
  Tensor norm, u;
};
WeightNorm weight_norm(const char* op, const DeviceWeight& weight, const Tensor& lora_A, const Tensor& lora_B,
                       double scaling, ScalarType type);

// The gradients of the norm, in the dtypes of lora_A and lora_B.
struct WeightNormGradient {
  Tensor grad_A, grad_B;
};
WeightNormGradient weight_norm_backward(const char* op, const Tensor& grad, const DeviceWeight& weight,
                                        const Tensor& lora_A, const Tensor& lora_B, const Tensor& norm, const Tensor& u,
                                        double scaling, ScalarType type);

}  // namespace peft_ext
