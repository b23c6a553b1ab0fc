// LoRA operators on CUDA: lora_linear, Y = x Wᵀ + (x̃ Aᵀ ∘ ρ) Bᵀ + b with x̃ = dropout(x), lora_residual, Y = residual
// + (x̃ Aᵀ ∘ ρ) Bᵀ, and the backward of both operators. ρ [R] is the scaling of each rank. See
// linear/cuda/adapted_linear.cuh.
#include <tuple>

#include "linear/cuda/adapted_linear.cuh"

namespace peft_ext {
namespace {

std::tuple<Tensor, Tensor> lora_linear_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& part1,
                                            const std::optional<Tensor>& part2, const std::optional<Tensor>& part3,
                                            const std::optional<Tensor>& part4, int64_t layout,
                                            const std::vector<int64_t>& shape, const std::optional<Tensor>& bias,
                                            const Tensor& lora_A, const Tensor& lora_B,
                                            const std::optional<Tensor>& rank_scale, double scaling, double dropout_p,
                                            const std::optional<Tensor>& seed) {
  constexpr const char* kOp = "lora_linear";
  const DeviceWeight held = device_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape, x.scalar_type());
  const DeviceAdapter adapter = lora_device_adapter(kOp, lora_A, lora_B, rank_scale, scaling, dropout_p, seed);
  const DeviceForward out = adapted_forward(kOp, x, held, bias, adapter, false, false);
  return {out.y, out.s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& part1,
    const std::optional<Tensor>& part2, const std::optional<Tensor>& part3, const std::optional<Tensor>& part4,
    int64_t layout, const std::vector<int64_t>& shape, const Tensor& lora_A, const Tensor& lora_B,
    const std::optional<Tensor>& rank_scale, const Tensor& s, double scaling, double dropout_p,
    const std::optional<Tensor>& seed, bool needs_grad_x) {
  constexpr const char* kOp = "lora_linear_backward";
  const DeviceWeight held = device_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape, x.scalar_type());
  const DeviceAdapter adapter = lora_device_adapter(kOp, lora_A, lora_B, rank_scale, scaling, dropout_p, seed);
  DeviceBackward out = adapted_backward(kOp, grad, x, held, adapter, s, needs_grad_x, std::nullopt);
  if (rank_scale.has_value()) out.grad_rank_scale = like(out.grad_rank_scale, *rank_scale);
  return {out.grad_x, out.grad_A, out.grad_B, out.grad_rank_scale};
}

std::tuple<Tensor, Tensor> lora_residual_cuda(const Tensor& x, const Tensor& residual, const Tensor& lora_A,
                                              const Tensor& lora_B, const std::optional<Tensor>& rank_scale,
                                              double scaling, double dropout_p, const std::optional<Tensor>& seed) {
  constexpr const char* kOp = "lora_residual";
  const DeviceAdapter adapter = lora_device_adapter(kOp, lora_A, lora_B, rank_scale, scaling, dropout_p, seed);
  const DeviceForward out = low_rank_forward(kOp, x, residual, adapter);
  return {out.y, out.s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_residual_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
    const std::optional<Tensor>& rank_scale, const Tensor& s, double scaling, double dropout_p,
    const std::optional<Tensor>& seed, bool needs_grad_x) {
  constexpr const char* kOp = "lora_residual_backward";
  const DeviceAdapter adapter = lora_device_adapter(kOp, lora_A, lora_B, rank_scale, scaling, dropout_p, seed);
  DeviceBackward out = low_rank_backward(kOp, grad, x, adapter, s, needs_grad_x);
  if (rank_scale.has_value()) out.grad_rank_scale = like(out.grad_rank_scale, *rank_scale);
  return {out.grad_x, out.grad_A, out.grad_B, out.grad_rank_scale};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) {
  m.impl("lora_linear", PEFT_EXT_CUDA_BOX(&peft_ext::lora_linear_cuda));
  m.impl("lora_linear_backward", PEFT_EXT_CUDA_BOX(&peft_ext::lora_linear_backward_cuda));
  m.impl("lora_residual", PEFT_EXT_CUDA_BOX(&peft_ext::lora_residual_cuda));
  m.impl("lora_residual_backward", PEFT_EXT_CUDA_BOX(&peft_ext::lora_residual_backward_cuda));
}
