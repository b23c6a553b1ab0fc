// The operator gated_lora_linear on CUDA: Y = h Wᵀ + (x̃ Aᵀ ∘ ρ) Bᵀ + b with h = act(gate) ∘ up and x̃ = dropout(h).
// See gated_lora/cuda/gated_linear.cuh.
#include <tuple>

#include "gated_lora/cuda/gated_linear.cuh"

namespace peft_ext {
namespace {

std::tuple<Tensor, Tensor> gated_lora_linear_cuda(
    const Tensor& gate, const std::optional<Tensor>& up, int64_t activation, const Tensor& weight,
    const std::optional<Tensor>& part1, const std::optional<Tensor>& part2, const std::optional<Tensor>& part3,
    const std::optional<Tensor>& part4, int64_t layout, const std::vector<int64_t>& shape,
    const std::optional<Tensor>& bias, const Tensor& lora_A, const Tensor& lora_B,
    const std::optional<Tensor>& rank_scale, double scaling, double dropout_p, const std::optional<Tensor>& seed) {
  constexpr const char* kOp = "gated_lora_linear";
  const DeviceWeight held = device_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape, gate.scalar_type());
  const DeviceAdapter adapter = lora_device_adapter(kOp, lora_A, lora_B, rank_scale, scaling, dropout_p, seed);
  const DeviceForward out = gated_forward(kOp, gate, up, activation, held, bias, adapter);
  return {out.y, out.s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_lora_linear_backward_cuda(
    const Tensor& grad, const Tensor& gate, const std::optional<Tensor>& up, int64_t activation, const Tensor& weight,
    const std::optional<Tensor>& part1, const std::optional<Tensor>& part2, const std::optional<Tensor>& part3,
    const std::optional<Tensor>& part4, int64_t layout, const std::vector<int64_t>& shape, const Tensor& lora_A,
    const Tensor& lora_B, const std::optional<Tensor>& rank_scale, const Tensor& s, double scaling, double dropout_p,
    const std::optional<Tensor>& seed, bool needs_grad_gate) {
  constexpr const char* kOp = "gated_lora_linear_backward";
  const DeviceWeight held = device_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape, gate.scalar_type());
  const DeviceAdapter adapter = lora_device_adapter(kOp, lora_A, lora_B, rank_scale, scaling, dropout_p, seed);
  GatedBackward out = gated_backward(kOp, grad, gate, up, activation, held, adapter, s, needs_grad_gate);
  DeviceBackward& layer = out.layer;
  if (rank_scale.has_value()) layer.grad_rank_scale = like(layer.grad_rank_scale, *rank_scale);
  return {out.grads.gate, out.grads.up, layer.grad_A, layer.grad_B, layer.grad_rank_scale};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) {
  m.impl("gated_lora_linear", PEFT_EXT_CUDA_BOX(&peft_ext::gated_lora_linear_cuda));
  m.impl("gated_lora_linear_backward", PEFT_EXT_CUDA_BOX(&peft_ext::gated_lora_linear_backward_cuda));
}
