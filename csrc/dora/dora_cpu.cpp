// DoRA operators on the CPU: the adapted linear layer with an output scale g = magnitude / norm, and the norm
// ‖W + s B A‖ of each row. See linear/cpu/adapted_linear.h.
#include <tuple>

#include "common/registration.h"
#include "cpu/operator_call.h"
#include "linear/cpu/adapted_linear.h"
#include "linear/cpu/weight_norm.h"

namespace peft_ext {
namespace {

std::tuple<Tensor, Tensor> dora_weight_norm_cpu(Tensor weight, std::optional<Tensor> part1, std::optional<Tensor> part2,
                                                std::optional<Tensor> part3, std::optional<Tensor> part4,
                                                int64_t layout, std::vector<int64_t> shape, Tensor lora_A,
                                                Tensor lora_B, double scaling, ScalarType type) {
  constexpr const char* kOp = "dora_weight_norm";
  const FrozenWeight held = checked_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape);
  const WeightNorm out = weight_norm(kOp, held, lora_A, lora_B, scaling, type);
  return {out.norm, out.u};
}

std::tuple<Tensor, Tensor> dora_weight_norm_backward_cpu(Tensor grad, Tensor weight, std::optional<Tensor> part1,
                                                         std::optional<Tensor> part2, std::optional<Tensor> part3,
                                                         std::optional<Tensor> part4, int64_t layout,
                                                         std::vector<int64_t> shape, Tensor lora_A, Tensor lora_B,
                                                         Tensor norm, Tensor u, double scaling, ScalarType type) {
  constexpr const char* kOp = "dora_weight_norm_backward";
  const FrozenWeight held = checked_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape);
  const WeightNormGradient out = weight_norm_backward(kOp, grad, held, lora_A, lora_B, norm, u, scaling, type);
  return {out.grad_A, out.grad_B};
}

Adapter dora_adapter(const char* op, const Tensor& lora_A, const Tensor& lora_B, const Tensor& out_scale, int64_t n,
                     double scaling, double dropout_p, const std::optional<Tensor>& seed, bool drop_base) {
  Adapter adapter;
  adapter.lora_A = lora_A;
  adapter.lora_B = lora_B;
  adapter.scaling = scaling;
  adapter.dropout = make_dropout(op, dropout_p, seed);
  adapter.drop_base = drop_base;
  adapter.out_scale = float_vector(op, "out_scale", out_scale, n);
  return adapter;
}

std::tuple<Tensor, Tensor, Tensor> dora_linear_cpu(Tensor x, Tensor weight, std::optional<Tensor> part1,
                                                   std::optional<Tensor> part2, std::optional<Tensor> part3,
                                                   std::optional<Tensor> part4, int64_t layout,
                                                   std::vector<int64_t> shape, std::optional<Tensor> bias,
                                                   Tensor lora_A, Tensor lora_B, Tensor out_scale, double scaling,
                                                   double dropout_p, std::optional<Tensor> seed, bool drop_base,
                                                   bool want_z) {
  constexpr const char* kOp = "dora_linear";
  const FrozenWeight held = checked_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape);
  const Adapter adapter =
      dora_adapter(kOp, lora_A, lora_B, out_scale, held.out_features(), scaling, dropout_p, seed, drop_base);
  const AdaptedForward out = adapted_forward(kOp, x, held, bias, adapter, false, want_z);
  return {out.y, out.s, out.z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dora_linear_backward_cpu(
    Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> part1, std::optional<Tensor> part2,
    std::optional<Tensor> part3, std::optional<Tensor> part4, int64_t layout, std::vector<int64_t> shape, Tensor lora_A,
    Tensor lora_B, Tensor out_scale, Tensor s, Tensor z, bool z_is_scaled, double scaling, double dropout_p,
    std::optional<Tensor> seed, bool drop_base, bool needs_grad_x, bool needs_grad_scale) {
  constexpr const char* kOp = "dora_linear_backward";
  const FrozenWeight held = checked_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape);
  const Adapter adapter =
      dora_adapter(kOp, lora_A, lora_B, out_scale, held.out_features(), scaling, dropout_p, seed, drop_base);
  const AdaptedBackward out = adapted_backward(kOp, grad, x, held, adapter, s, needs_grad_x);
  Tensor grad_scale = empty({0}, ScalarType::Float);
  if (needs_grad_scale) grad_scale = scale_gradient(kOp, grad, x, held, adapter, s, z, z_is_scaled, std::nullopt);
  return {out.grad_x, out.grad_A, out.grad_B, grad_scale};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) {
  m.impl("dora_weight_norm", PEFT_EXT_CPU_BOX(&peft_ext::dora_weight_norm_cpu));
  m.impl("dora_weight_norm_backward", PEFT_EXT_CPU_BOX(&peft_ext::dora_weight_norm_backward_cpu));
  m.impl("dora_linear", PEFT_EXT_CPU_BOX(&peft_ext::dora_linear_cpu));
  m.impl("dora_linear_backward", PEFT_EXT_CPU_BOX(&peft_ext::dora_linear_backward_cpu));
}
