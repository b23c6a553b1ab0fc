// The operator grouped_lora_linear on the CPU: the adapted linear layer for a batch in which each sample has its own
// LoRA adapter or none. See linear/cpu/grouped.h.
#include <tuple>

#include "common/registration.h"
#include "cpu/operator_call.h"
#include "linear/cpu/adapted_linear.h"

namespace peft_ext {
namespace {

std::tuple<Tensor, Tensor> grouped_lora_linear_cpu(Tensor x, Tensor weight, std::optional<Tensor> part1,
                                                   std::optional<Tensor> part2, std::optional<Tensor> part3,
                                                   std::optional<Tensor> part4, int64_t layout,
                                                   std::vector<int64_t> shape, std::optional<Tensor> bias,
                                                   std::vector<Tensor> lora_A, std::vector<Tensor> lora_B,
                                                   std::vector<double> scaling, std::vector<int64_t> adapters) {
  constexpr const char* kOp = "grouped_lora_linear";
  const FrozenWeight held = checked_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape);
  STD_TORCH_CHECK(x.dim() >= 1, kOp, ": x has no dimensions, wanted [..., K]");
  const Groups groups =
      make_groups(kOp, lora_A, lora_B, scaling, adapters, rows_of(x), held.in_features(), held.out_features());
  Adapter adapter;
  adapter.groups = &groups;
  const AdaptedForward out = adapted_forward(kOp, x, held, bias, adapter, false, false);
  return {out.y, out.s};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) { m.impl("grouped_lora_linear", PEFT_EXT_CPU_BOX(&peft_ext::grouped_lora_linear_cpu)); }
