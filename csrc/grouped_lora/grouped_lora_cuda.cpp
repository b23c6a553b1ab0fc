// The operator grouped_lora_linear on CUDA: the adapted linear layer for a batch in which each sample has its own LoRA
// adapter or none. See linear/cuda/grouped_cuda.cpp.
#include <algorithm>
#include <tuple>

#include "linear/cuda/adapted_linear.cuh"

namespace peft_ext {
namespace {

std::tuple<Tensor, Tensor> grouped_lora_linear_cuda(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& part1, const std::optional<Tensor>& part2,
    const std::optional<Tensor>& part3, const std::optional<Tensor>& part4, int64_t layout,
    const std::vector<int64_t>& shape, const std::optional<Tensor>& bias, const std::vector<Tensor>& lora_A,
    const std::vector<Tensor>& lora_B, const std::vector<double>& scaling, const std::vector<int64_t>& adapters) {
  constexpr const char* kOp = "grouped_lora_linear";
  const DeviceWeight held = device_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape, x.scalar_type());
  STD_TORCH_CHECK(!lora_A.empty() && lora_B.size() == lora_A.size() && scaling.size() == lora_A.size(), kOp, ": ",
                  lora_A.size(), " of lora_A, ", lora_B.size(), " of lora_B and ", scaling.size(),
                  " of scaling, wanted as many");
  DeviceGroups groups;
  for (size_t g = 0; g < lora_A.size(); ++g) {
    const Tensor &a = lora_A[g], &b = lora_B[g];
    check_matrix(kOp, "lora_A", a, x);
    check_matrix(kOp, "lora_B", b, x);
    STD_TORCH_CHECK(a.dim() == 2 && a.size(1) == held.inputs, kOp, ": lora_A ", g, " has ", a.numel(),
                    " elements, wanted [R, ", held.inputs, "]");
    STD_TORCH_CHECK(b.dim() == 2 && b.size(0) == held.outputs && b.size(1) == a.size(0), kOp, ": lora_B ", g,
                    " is not [", held.outputs, ", ", a.size(0), "]");
    groups.rank = std::max(groups.rank, a.size(0));
  }
  const auto samples = static_cast<int64_t>(adapters.size()), tokens = x.dim() >= 1 ? device_rows(x) : 0;
  STD_TORCH_CHECK(samples > 0 ? tokens % samples == 0 : tokens == 0, kOp, ": adapters has ", samples,
                  " elements for x of ", tokens, " tokens");
  for (const int64_t group : adapters)
    STD_TORCH_CHECK(group >= -1 && group < static_cast<int64_t>(lora_A.size()), kOp, ": adapters has ", group,
                    ", wanted -1 to ", static_cast<int64_t>(lora_A.size()) - 1);
  // Only adapters that a sample uses are passed to the kernels, so that an unused adapter may hold any values.
  std::vector<int64_t> place(lora_A.size(), -1);
  for (const int64_t group : adapters) {
    if (group < 0 || lora_A[static_cast<size_t>(group)].size(0) == 0) {
      groups.adapters.push_back(-1);
      continue;
    }
    const auto g = static_cast<size_t>(group);
    if (place[g] < 0) {
      place[g] = static_cast<int64_t>(groups.lora_A.size());
      groups.lora_A.push_back(lora_A[g]);
      groups.lora_B.push_back(lora_B[g]);
      groups.scaling.push_back(scaling[g]);
    }
    groups.adapters.push_back(place[g]);
  }
  const DeviceForward out = grouped_forward(kOp, x, held, bias, groups);
  return {out.y, out.s};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) { m.impl("grouped_lora_linear", PEFT_EXT_CUDA_BOX(&peft_ext::grouped_lora_linear_cuda)); }
