// Tensors made and looked at by direct calls. The stable ABI's own functions of these names look an operator up by its
// name and box the arguments, about a microsecond each, also where there is nothing to do; an operator of a few tokens
// makes a dozen of them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <vector>

namespace peft_ext {

inline std::vector<int64_t> row_major_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * (shape[d] > 1 ? shape[d] : 1);
  return strides;
}

inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline torch::stable::Tensor as_type(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// Where it lies if its last dimension is in one piece.
inline torch::stable::Tensor with_whole_rows(const torch::stable::Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : as_contiguous(x);
}

// Of x's shape, its dimensions in x's order, as PyTorch's own operators have them; the last one is in one piece.
inline torch::stable::Tensor like_with_whole_rows(const torch::stable::Tensor& x) {
  const torch::stable::Tensor y = torch::stable::empty_like(x);
  if (y.stride(x.dim() - 1) == 1) return y;
  return torch::stable::new_empty(x, {x.sizes().begin(), x.sizes().end()}, std::nullopt);
}

// A contiguous tensor in another shape of as many elements.
inline torch::stable::Tensor as_shape(const torch::stable::Tensor& tensor, const std::vector<int64_t>& shape) {
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  if (!tensor.is_contiguous() || elements != tensor.numel()) return torch::stable::view(tensor, shape);
  AtenTensorHandle out = nullptr;  // the offset is added to the tensor's own
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(shape.size()), shape.data(),
                                                        row_major_strides(shape).data(), 0, &out));
  return torch::stable::Tensor(out);
}

inline torch::stable::Tensor empty_on(int32_t device_type, int32_t device_index, const std::vector<int64_t>& shape,
                                      torch::headeronly::ScalarType type) {
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  row_major_strides(shape).data(), static_cast<int32_t>(type),
                                                  device_type, device_index, &out));
  return torch::stable::Tensor(out);
}

}  // namespace peft_ext
