// Functions on tensors. Most of these functions call torch::stable only if there is work to do, or call PyTorch's C
// shim directly. Many functions of torch::stable look an operator up by name and box the arguments, which takes about a
// microsecond per call, even if nothing has to be done. An operator on few tokens calls the functions of this file
// about a dozen times.
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

// Returns x if the last dimension of x is contiguous, otherwise a contiguous copy of x.
inline torch::stable::Tensor with_whole_rows(const torch::stable::Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : as_contiguous(x);
}

// Returns an empty tensor of x's shape whose last dimension is contiguous. The other dimensions have x's order of
// strides, as in PyTorch's own operators, if x's last dimension is contiguous.
inline torch::stable::Tensor like_with_whole_rows(const torch::stable::Tensor& x) {
  const torch::stable::Tensor y = torch::stable::empty_like(x);
  if (y.stride(x.dim() - 1) == 1) return y;
  return torch::stable::new_empty(x, {x.sizes().begin(), x.sizes().end()}, std::nullopt);
}

// Returns a view of the tensor in another shape with equally many elements. The view shares the tensor's memory.
inline torch::stable::Tensor as_shape(const torch::stable::Tensor& tensor, const std::vector<int64_t>& shape) {
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  if (!tensor.is_contiguous() || elements != tensor.numel()) return torch::stable::view(tensor, shape);
  AtenTensorHandle out = nullptr;  // offset 0 is relative to the tensor's storage offset
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
