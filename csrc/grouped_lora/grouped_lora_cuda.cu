// The adapted linear layer with an adapter for each sample, for CUDA. See linear/cuda/select_ranks.cuh.
#include <algorithm>
#include <tuple>

#include "linear/cuda/adapted_linear.cuh"

namespace peft_ext {
namespace {

// The matrices along `dim`, in one; float32 where their types differ.
Tensor side_by_side(const std::vector<Tensor>& matrices, int64_t dim) {
  ScalarType type = matrices[0].scalar_type();
  std::vector<int64_t> shape{matrices[0].size(0), matrices[0].size(1)};
  shape[static_cast<size_t>(dim)] = 0;
  for (const Tensor& matrix : matrices) {
    if (matrix.scalar_type() != type) type = ScalarType::Float;
    shape[static_cast<size_t>(dim)] += matrix.size(dim);
  }
  if (matrices.size() == 1) return matrices[0];
  Tensor all = device_empty(matrices[0], shape, type);
  int64_t from = 0;
  for (const Tensor& matrix : matrices) {
    Tensor part = torch::stable::narrow(all, dim, from, matrix.size(dim));
    torch::stable::copy_(part, matrix);
    from += matrix.size(dim);
  }
  return all;
}

std::tuple<Tensor, Tensor> grouped_lora_linear_cuda(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& absmax,
    const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
    const std::optional<Tensor>& nested_offset, int64_t blocksize, const std::vector<int64_t>& shape,
    const std::optional<Tensor>& bias, const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
    const std::vector<double>& scaling, const std::vector<int64_t>& adapters) {
  constexpr const char* kOp = "grouped_lora_linear";
  const DeviceWeight held =
      device_weight(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape, x.scalar_type());
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
  // Those that a sample has: what no sample asked for costs nothing, and may hold anything.
  std::vector<int64_t> place(lora_A.size(), -1);
  std::vector<Tensor> used_A, used_B;
  const auto use = [&](size_t g) {
    if (place[g] >= 0) return;
    place[g] = static_cast<int64_t>(used_A.size());
    used_A.push_back(lora_A[g]);
    used_B.push_back(lora_B[g]);
    groups.ranks.push_back(lora_A[g].size(0));
    groups.scaling.push_back(static_cast<float>(scaling[g]));
  };
  for (const int64_t group : adapters) {
    if (group >= 0) use(static_cast<size_t>(group));
    groups.adapters.push_back(group < 0 ? -1 : place[static_cast<size_t>(group)]);
  }
  if (used_A.empty()) use(0);
  DeviceAdapter adapter;
  adapter.lora_A = side_by_side(used_A, 0);
  adapter.lora_B = side_by_side(used_B, 1);
  adapter.groups = &groups;
  const DeviceForward out = adapted_forward(kOp, x, held, bias, adapter, false, false);
  return {out.y, out.s};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) { m.impl("grouped_lora_linear", TORCH_BOX(&peft_ext::grouped_lora_linear_cuda)); }
