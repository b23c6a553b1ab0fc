// Defines the IA3 operators on the CPU: a linear layer whose input or output is scaled by the vector l (the argument
// ia3_l), and the scaling alone.
//
//   output:       Y = l ∘ (x Wᵀ + b)    dX = (l ∘ dY) W    dl = sum_t dY ∘ (x Wᵀ + b).
//   feedforward:  Y = (l ∘ x) Wᵀ + b    dX = l ∘ U         dl = sum_t x ∘ U,  U = dY W.
#include <tuple>

#include "common/registration.h"
#include "cpu/operator_call.h"
#include "linear/cpu/adapted_linear.h"

namespace peft_ext {
namespace {

Adapter ia3_adapter(const char* op, const Tensor& ia3_l, const FrozenWeight& weight, bool feedforward) {
  Adapter adapter;
  const int64_t size = feedforward ? weight.in_features() : weight.out_features();
  (feedforward ? adapter.in_scale : adapter.out_scale) = float_vector(op, "ia3_l", ia3_l, size);
  return adapter;
}

std::tuple<Tensor, Tensor> ia3_linear_cpu(Tensor x, Tensor weight, std::optional<Tensor> part1,
                                          std::optional<Tensor> part2, std::optional<Tensor> part3,
                                          std::optional<Tensor> part4, int64_t layout, std::vector<int64_t> shape,
                                          std::optional<Tensor> bias, Tensor ia3_l, bool feedforward, bool want_z) {
  constexpr const char* kOp = "ia3_linear";
  const FrozenWeight held = checked_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape);
  const AdaptedForward out =
      adapted_forward(kOp, x, held, bias, ia3_adapter(kOp, ia3_l, held, feedforward), true, want_z);
  return {out.y, out.z};
}

std::tuple<Tensor, Tensor> ia3_linear_backward_cpu(Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> part1,
                                                   std::optional<Tensor> part2, std::optional<Tensor> part3,
                                                   std::optional<Tensor> part4, int64_t layout,
                                                   std::vector<int64_t> shape, std::optional<Tensor> bias, Tensor ia3_l,
                                                   std::optional<Tensor> z, bool z_is_scaled, bool feedforward,
                                                   bool needs_grad_x, bool needs_grad_l) {
  constexpr const char* kOp = "ia3_linear_backward";
  const FrozenWeight held = checked_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape);
  const Adapter adapter = ia3_adapter(kOp, ia3_l, held, feedforward);
  Tensor grad_x = empty({0}, x.scalar_type()), grad_l = empty({0}, ia3_l.scalar_type());
  // For a feedforward layer, adapted_backward computes the gradient of l together with dX.
  if (needs_grad_x || (feedforward && needs_grad_l)) {
    const AdaptedBackward out = adapted_backward(kOp, grad, x, held, adapter, std::nullopt, needs_grad_x);
    if (needs_grad_x) grad_x = out.grad_x;
    if (feedforward && needs_grad_l) grad_l = like(out.grad_in_scale, ia3_l);
  }
  if (!feedforward && needs_grad_l) {
    STD_TORCH_CHECK(z.has_value(), kOp, ": z is None, wanted the forward's z or its result");
    grad_l = like(scale_gradient(kOp, grad, x, held, adapter, std::nullopt, *z, z_is_scaled, bias), ia3_l);
  }
  return {grad_x, grad_l};
}

Tensor ia3_scale_cpu(Tensor x, Tensor ia3_l) {
  constexpr const char* kOp = "ia3_scale";
  const Tensor scale = float_vector(kOp, "ia3_l", ia3_l, x.size(x.dim() - 1));
  return column_pass(kOp, x, &scale, 0.0f, nullptr).scaled;
}

std::tuple<Tensor, Tensor> ia3_scale_backward_cpu(Tensor grad, Tensor x, Tensor ia3_l, bool needs_grad_x,
                                                  bool needs_grad_l) {
  constexpr const char* kOp = "ia3_scale_backward";
  STD_TORCH_CHECK(same_sizes(grad, x), kOp, ": grad is not of x's shape");
  const Tensor scale = float_vector(kOp, "ia3_l", ia3_l, x.size(x.dim() - 1));
  ColumnSums out = column_pass(kOp, grad, needs_grad_x ? &scale : nullptr, 0.0f, needs_grad_l ? &x : nullptr);
  return {out.scaled, needs_grad_l ? like(out.sums, ia3_l) : empty({0}, ia3_l.scalar_type())};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) {
  m.impl("ia3_linear", PEFT_EXT_CPU_BOX(&peft_ext::ia3_linear_cpu));
  m.impl("ia3_linear_backward", PEFT_EXT_CPU_BOX(&peft_ext::ia3_linear_backward_cpu));
  m.impl("ia3_scale", PEFT_EXT_CPU_BOX(&peft_ext::ia3_scale_cpu));
  m.impl("ia3_scale_backward", PEFT_EXT_CPU_BOX(&peft_ext::ia3_scale_backward_cpu));
}
