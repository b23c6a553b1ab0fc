// The operator nf4_linear on the CPU, a linear layer over a frozen dense or packed weight: Y = x Wᵀ + b, dX = dY W. See
// adapted_linear.h.
#include "common/registration.h"
#include "cpu/operator_call.h"
#include "linear/cpu/adapted_linear.h"

namespace peft_ext {
namespace {

Tensor nf4_linear_cpu(Tensor x, Tensor weight, std::optional<Tensor> part1, std::optional<Tensor> part2,
                      std::optional<Tensor> part3, std::optional<Tensor> part4, int64_t layout,
                      std::vector<int64_t> shape, std::optional<Tensor> bias) {
  constexpr const char* kOp = "nf4_linear";
  const FrozenWeight held = checked_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape);
  return adapted_forward(kOp, x, held, bias, Adapter(), false, false).y;
}

Tensor nf4_linear_backward_cpu(Tensor grad, Tensor weight, std::optional<Tensor> part1, std::optional<Tensor> part2,
                               std::optional<Tensor> part3, std::optional<Tensor> part4, int64_t layout,
                               std::vector<int64_t> shape) {
  constexpr const char* kOp = "nf4_linear_backward";
  const FrozenWeight held = checked_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape);
  STD_TORCH_CHECK(grad.dim() >= 1 && grad.size(grad.dim() - 1) == held.out_features(), kOp, ": grad has ", grad.numel(),
                  " elements, wanted rows of ", held.out_features());
  return frozen_backward(kOp, grad, held);
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) {
  m.impl("nf4_linear", PEFT_EXT_CPU_BOX(&peft_ext::nf4_linear_cpu));
  m.impl("nf4_linear_backward", PEFT_EXT_CPU_BOX(&peft_ext::nf4_linear_backward_cpu));
}
