// LoRA operators on the CPU: lora_linear, Y = x Wᵀ + (x̃ Aᵀ ∘ ρ) Bᵀ + b with x̃ = dropout(x), lora_residual, Y =
// residual + (x̃ Aᵀ ∘ ρ) Bᵀ, and the backward of both operators. ρ [R] is the scaling of each rank. See
// linear/cpu/adapted_linear.h.
#include <tuple>

#include "common/registration.h"
#include "cpu/operator_call.h"
#include "linear/cpu/adapted_linear.h"

namespace peft_ext {
namespace {

std::tuple<Tensor, Tensor> lora_linear_cpu(Tensor x, Tensor weight, std::optional<Tensor> part1,
                                           std::optional<Tensor> part2, std::optional<Tensor> part3,
                                           std::optional<Tensor> part4, int64_t layout, std::vector<int64_t> shape,
                                           std::optional<Tensor> bias, Tensor lora_A, Tensor lora_B,
                                           std::optional<Tensor> rank_scale, double scaling, double dropout_p,
                                           std::optional<Tensor> seed) {
  constexpr const char* kOp = "lora_linear";
  const FrozenWeight held = checked_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape);
  const Adapter adapter = lora_adapter(kOp, lora_A, lora_B, rank_scale, scaling, dropout_p, seed);
  const AdaptedForward out = adapted_forward(kOp, x, held, bias, adapter, false, false);
  return {out.y, out.s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_backward_cpu(
    Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> part1, std::optional<Tensor> part2,
    std::optional<Tensor> part3, std::optional<Tensor> part4, int64_t layout, std::vector<int64_t> shape, Tensor lora_A,
    Tensor lora_B, std::optional<Tensor> rank_scale, Tensor s, double scaling, double dropout_p,
    std::optional<Tensor> seed, bool needs_grad_x) {
  constexpr const char* kOp = "lora_linear_backward";
  const FrozenWeight held = checked_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape);
  const Adapter adapter = lora_adapter(kOp, lora_A, lora_B, rank_scale, scaling, dropout_p, seed);
  AdaptedBackward out = adapted_backward(kOp, grad, x, held, adapter, s, needs_grad_x);
  if (rank_scale.has_value()) out.grad_rank_scale = like(out.grad_rank_scale, *rank_scale);
  return {out.grad_x, out.grad_A, out.grad_B, out.grad_rank_scale};
}

std::tuple<Tensor, Tensor> lora_residual_cpu(Tensor x, Tensor residual, Tensor lora_A, Tensor lora_B,
                                             std::optional<Tensor> rank_scale, double scaling, double dropout_p,
                                             std::optional<Tensor> seed) {
  constexpr const char* kOp = "lora_residual";
  const Adapter adapter = lora_adapter(kOp, lora_A, lora_B, rank_scale, scaling, dropout_p, seed);
  const AdaptedForward out = low_rank_forward(kOp, x, residual, adapter);
  return {out.y, out.s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_residual_backward_cpu(Tensor grad, Tensor x, Tensor lora_A,
                                                                      Tensor lora_B, std::optional<Tensor> rank_scale,
                                                                      Tensor s, double scaling, double dropout_p,
                                                                      std::optional<Tensor> seed, bool needs_grad_x) {
  constexpr const char* kOp = "lora_residual_backward";
  const Adapter adapter = lora_adapter(kOp, lora_A, lora_B, rank_scale, scaling, dropout_p, seed);
  AdaptedBackward out = low_rank_backward(kOp, grad, x, adapter, s, needs_grad_x);
  if (rank_scale.has_value()) out.grad_rank_scale = like(out.grad_rank_scale, *rank_scale);
  return {out.grad_x, out.grad_A, out.grad_B, out.grad_rank_scale};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) {
  m.impl("lora_linear", PEFT_EXT_CPU_BOX(&peft_ext::lora_linear_cpu));
  m.impl("lora_linear_backward", PEFT_EXT_CPU_BOX(&peft_ext::lora_linear_backward_cpu));
  m.impl("lora_residual", PEFT_EXT_CPU_BOX(&peft_ext::lora_residual_cpu));
  m.impl("lora_residual_backward", PEFT_EXT_CPU_BOX(&peft_ext::lora_residual_backward_cpu));
}
