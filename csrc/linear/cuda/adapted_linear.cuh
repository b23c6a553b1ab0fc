// Declares the forward and the backward of the adapted linear layer on CUDA. The names in the formula are those of
// linear/cpu/adapted_linear.h:
//
//   x̃ = dropout(x)     S = x̃ Aᵀ [T, R]     Z = x Wᵀ + S (ρB)ᵀ [T, N]     Y = g ∘ (Z + b₀) + b₁
//
// With drop_base (dropout acts on the base product too, as in PEFT's DoRA), Z = x̃ Wᵀ + S (ρB)ᵀ, Y = x Wᵀ + b₁ + g ∘ Z
// - x̃ Wᵀ. With in_scale l, x in these formulas is l ∘ x. PyTorch's matrix product computes x Wᵀ and dY W. If a kernel
// of peft_ext has already written the low-rank term and the bias to Y, or the low-rank part to dX, PyTorch adds the
// product in place. If few_tokens_accept returns true, only kernels of peft_ext compute the forward. few_tokens_accept
// requires few tokens, a packed weight and no dropout on the base, and for NF4 also a 16-bit dtype and a number of
// inputs that is a multiple of 32.
#pragma once

#include "weight/device_weight.cuh"

namespace peft_ext {

// The adapter of a frozen linear layer on a GPU. rank_scale, out_scale and in_scale are float32 and contiguous. ρ, the
// factors of the ranks, is scaling times rank_scale (ones if rank_scale is missing).
struct DeviceAdapter {
  std::optional<Tensor> lora_A, lora_B;  // lora_A is [R, K], lora_B is [N, R]; the two dtypes may differ
  std::optional<Tensor> rank_scale;      // [R]
  double scaling = 1.0;
  double dropout_p = 0.0;
  // Seed and offset of Philox, int64 [2], on the layer's device or on the CPU; nullopt if there is no dropout.
  std::optional<Tensor> seed;
  bool drop_base = false;
  std::optional<Tensor> out_scale;  // g [N]
  std::optional<Tensor> in_scale;   // l [K]
};

DeviceAdapter lora_device_adapter(const char* op, const Tensor& lora_A, const Tensor& lora_B,
                                  const std::optional<Tensor>& rank_scale, double scaling, double dropout_p,
                                  const std::optional<Tensor>& seed);

struct DeviceForward {
  Tensor y;  // Y, [..., N] of x's dtype
  Tensor s;  // S, [T, R] float32; shape [0] if the layer has no adapter matrices
  Tensor z;  // Z + b₀, [T, N] of x's dtype; shape [0] if want_z is false
};

struct DeviceShrunk;

// Computes the forward of the adapted linear layer. If bias_inside is true, `bias` is b₀, which g scales; otherwise
// `bias` is b₁, which g does not scale. shrunk: S and the bfloat16 terms (terms.cuh) of S ∘ ρ and of B, if another
// pass has already computed S (a pass over x for several layers, or rank_gated_kernel); otherwise null.
DeviceForward adapted_forward(const char* op, const Tensor& x, const DeviceWeight& weight,
                              const std::optional<Tensor>& bias, const DeviceAdapter& adapter, bool bias_inside,
                              bool want_z, const DeviceShrunk* shrunk = nullptr);

// The adapters of a mixed batch, in which each sample has its own adapter or none.
struct DeviceGroups {
  std::vector<Tensor> lora_A, lora_B;  // matrices of those adapters that a sample uses, of rank 1 or more
  std::vector<double> scaling;         // scaling s_g of each adapter g
  std::vector<int64_t> adapters;       // index of each sample's adapter, or -1 for none
  int64_t rank = 0;                    // largest rank of all adapters, including adapters that no sample uses
};

// Computes Y_i = x_i Wᵀ + s_g S_i B_gᵀ + b and S_i = x_i A_gᵀ, where g is the adapter of sample i. S is
// [T, groups.rank], with zeros beyond the rank of a token's adapter.
DeviceForward grouped_forward(const char* op, const Tensor& x, const DeviceWeight& weight,
                              const std::optional<Tensor>& bias, const DeviceGroups& groups);

struct DeviceBackward {
  Tensor grad_x;           // dX in x's shape; shape [0] if needs_grad_x is false
  Tensor grad_A, grad_B;   // gradients of lora_A and lora_B, in their dtypes; unset if lora_A is missing
  Tensor grad_rank_scale;  // gradient of rank_scale, [R] float32; shape [0] if rank_scale is missing
  Tensor grad_in_scale;    // gradient of in_scale, [K] float32; shape [0] if in_scale is missing
  Tensor grad_out_scale;   // gradient of out_scale, [N] float32; shape [0] if z is nullopt
};

// Computes the backward of the adapted linear layer. s and z are S and Z + b₀ from the forward. z is needed for the
// gradient of g, Σ_t dY ∘ (Z + b₀).
DeviceBackward adapted_backward(const char* op, const Tensor& grad, const Tensor& x, const DeviceWeight& weight,
                                const DeviceAdapter& adapter, const std::optional<Tensor>& s, bool needs_grad_x,
                                const std::optional<Tensor>& z);

// One of several layers that have the same input x.
struct DeviceLayer {
  DeviceWeight weight;
  std::optional<Tensor> bias;  // b₁
  DeviceAdapter adapter;       // the layer's adapter, in which drop_base, out_scale and in_scale must not be set
};

// Computes the forward of several layers with the same input x. If siblings_read(x) is true, one pass over x computes S
// of up to six layers (three if the padded rank is 32) whose padded rank is the same and at most 32, and whose lora_A
// have equally many bfloat16 terms. For a layer that few_tokens_accept accepts, S is computed separately.
std::vector<DeviceForward> adapted_forwards(const char* op, const Tensor& x, const std::vector<DeviceLayer>& layers);

// Result of the backward of several layers with the same input. dX is the sum over the layers: expand_dropped writes
// the sum of the layers' low-rank parts of dX, each with the layer's dropout mask, and each layer's product dY W is
// added to that sum. If a layer has no lora_A, lora_B or rank_scale, the gradient of the missing tensor has shape [0].
// A layer whose dY is missing adds nothing to dX, and all of its gradients have shape [0].
struct DeviceSiblingsBackward {
  Tensor grad_x;  // dX in x's shape; shape [0] if needs_grad_x is false
  std::vector<DeviceBackward> layers;
};
DeviceSiblingsBackward adapted_backwards(const char* op, const std::vector<std::optional<Tensor>>& grads,
                                         const Tensor& x, const std::vector<DeviceLayer>& layers,
                                         const std::vector<Tensor>& s, bool needs_grad_x);

// Computes Y = residual + S (ρB)ᵀ. residual is the output of a base layer that the operator does not compute, in x's
// dtype.
DeviceForward low_rank_forward(const char* op, const Tensor& x, const Tensor& residual, const DeviceAdapter& adapter);
DeviceBackward low_rank_backward(const char* op, const Tensor& grad, const Tensor& x, const DeviceAdapter& adapter,
                                 const Tensor& s, bool needs_grad_x);

// frozen_backward returns dX = dY W, [..., K] in dY's dtype, for a frozen layer without an adapter.
Tensor frozen_backward(const char* op, const Tensor& grad, const DeviceWeight& weight);

// Results of scale_columns, which makes one pass over m. scaled: m ∘ scale in m's dtype and shape; [0] if `scale`,
// float32 [columns], is missing. sums: Σ_t m[t] ∘ other[t], float32 [columns]; [0] if `other` is missing.
struct ColumnProducts {
  Tensor scaled, sums;
};
ColumnProducts scale_columns(const Tensor& m, const std::optional<Tensor>& scale, const std::optional<Tensor>& other);

// Results of weight_norm. norm: the norm of each row of W + s B A, [N] float32, where s is the LoRA scaling. u: U = W
// Aᵀ, [N, R] float32. A packed weight is decoded to `type`.
struct DeviceNorm {
  Tensor norm, u;
};
DeviceNorm weight_norm(const char* op, const DeviceWeight& weight, const Tensor& lora_A, const Tensor& lora_B,
                       double scaling, ScalarType type);

// The gradients of lora_A and lora_B through DeviceNorm::norm, in the dtypes of lora_A and lora_B.
struct DeviceNormGradient {
  Tensor grad_A, grad_B;
};
DeviceNormGradient weight_norm_backward(const char* op, const Tensor& grad, const DeviceWeight& weight,
                                        const Tensor& lora_A, const Tensor& lora_B, const Tensor& norm, const Tensor& u,
                                        double scaling, ScalarType type);

}  // namespace peft_ext
