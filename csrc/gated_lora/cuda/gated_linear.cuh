// Declares the forward and the backward, on CUDA, of the adapted linear layer whose input is a gated activation: h =
// act(gate) ∘ up is the x of adapted_linear.cuh. The layer has lora_A and lora_B, and neither an output scale, an input
// scale nor dropout on the base.
#pragma once

#include "activations/gated_call.cuh"
#include "linear/cuda/adapted_linear.cuh"

namespace peft_ext {

struct GatedPass;

// Parameters that select an instance of rank_gated_kernel. launch_gated launches the instance for element type T; each
// element type has its own translation unit.
struct GatedVariant {
  int64_t ranks, terms;
  bool columns;
};
template <typename T>
void launch_gated(const Launcher& launcher, const Grid& grid, const GatedPass& pass, const GatedVariant& variant);

// Computes Y and S. If rank_gated_kernel can read gate and up, the padded rank is at most 32 and few_tokens_accept does
// not accept the call, one launch computes h and the partial sums of S. Otherwise one launch computes h, and
// adapted_forward computes the layer. If up has no value, gate holds both operands.
DeviceForward gated_forward(const char* op, const Tensor& gate, const std::optional<Tensor>& up, int64_t activation,
                            const DeviceWeight& weight, const std::optional<Tensor>& bias,
                            const DeviceAdapter& adapter);

struct GatedBackward {
  GatedGradients grads;  // both [0] if needs_grad_gate is false
  DeviceBackward layer;  // the gradients of lora_A, lora_B and rank_scale; grad_x is not a result
};

// Computes the backward. s is S from the forward. If needs_grad_gate is true, rank_gated_kernel can read gate and up,
// and the padded rank is at most 32, the low-rank part of dh is written first, PyTorch adds dY W, and one launch then
// computes the gradients of gate and up and the partial sums of the gradient of lora_A, without a tensor h. Otherwise
// one launch computes h, adapted_backward computes the gradients of the layer, and another launch computes the
// gradients of gate and up, if needs_grad_gate is true.
GatedBackward gated_backward(const char* op, const Tensor& grad, const Tensor& gate, const std::optional<Tensor>& up,
                             int64_t activation, const DeviceWeight& weight, const DeviceAdapter& adapter,
                             const Tensor& s, bool needs_grad_gate);

}  // namespace peft_ext
