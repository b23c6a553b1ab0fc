// The operator gated_lora_linear on the CPU: Y = h Wᵀ + (x̃ Aᵀ ∘ ρ) Bᵀ + b with h = act(gate) ∘ up and x̃ = dropout(h).
// The kernels of the gated activation compute h, in the forward and again in the backward. See
// linear/cpu/adapted_linear.h.
#include <tuple>

#include "activations/operators.h"
#include "common/registration.h"
#include "cpu/operator_call.h"
#include "linear/cpu/adapted_linear.h"

namespace peft_ext {
namespace {

std::tuple<Tensor, Tensor> gated_lora_linear_cpu(Tensor gate, std::optional<Tensor> up, int64_t activation,
                                                 Tensor weight, std::optional<Tensor> part1,
                                                 std::optional<Tensor> part2, std::optional<Tensor> part3,
                                                 std::optional<Tensor> part4, int64_t layout,
                                                 std::vector<int64_t> shape, std::optional<Tensor> bias, Tensor lora_A,
                                                 Tensor lora_B, std::optional<Tensor> rank_scale, double scaling,
                                                 double dropout_p, std::optional<Tensor> seed) {
  constexpr const char* kOp = "gated_lora_linear";
  const FrozenWeight held = checked_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape);
  const Adapter adapter = lora_adapter(kOp, lora_A, lora_B, rank_scale, scaling, dropout_p, seed);
  const AdaptedForward out =
      adapted_forward(kOp, cpu_gated_value(kOp, gate, up, activation), held, bias, adapter, false, false);
  return {out.y, out.s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_lora_linear_backward_cpu(
    Tensor grad, Tensor gate, std::optional<Tensor> up, int64_t activation, Tensor weight, std::optional<Tensor> part1,
    std::optional<Tensor> part2, std::optional<Tensor> part3, std::optional<Tensor> part4, int64_t layout,
    std::vector<int64_t> shape, Tensor lora_A, Tensor lora_B, std::optional<Tensor> rank_scale, Tensor s,
    double scaling, double dropout_p, std::optional<Tensor> seed, bool needs_grad_gate) {
  constexpr const char* kOp = "gated_lora_linear_backward";
  const FrozenWeight held = checked_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape);
  const Adapter adapter = lora_adapter(kOp, lora_A, lora_B, rank_scale, scaling, dropout_p, seed);
  AdaptedBackward out =
      adapted_backward(kOp, grad, cpu_gated_value(kOp, gate, up, activation), held, adapter, s, needs_grad_gate);
  Tensor grad_gate = out.grad_x, grad_up = none(gate.scalar_type());
  if (needs_grad_gate) std::tie(grad_gate, grad_up) = cpu_gated_gradients(kOp, out.grad_x, gate, up, activation);
  if (rank_scale.has_value()) out.grad_rank_scale = like(out.grad_rank_scale, *rank_scale);
  return {grad_gate, grad_up, out.grad_A, out.grad_B, out.grad_rank_scale};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) {
  m.impl("gated_lora_linear", PEFT_EXT_CPU_BOX(&peft_ext::gated_lora_linear_cpu));
  m.impl("gated_lora_linear_backward", PEFT_EXT_CPU_BOX(&peft_ext::gated_lora_linear_backward_cpu));
}
