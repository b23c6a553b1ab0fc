// Functions on tensors that take little time in calls with few tokens. Many functions of torch::stable look an operator
// up by name and box the arguments, which takes about a microsecond even if nothing has to be done. Most functions of
// this file therefore call torch::stable only if there is work to do, or call PyTorch's C shim directly.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

namespace peft_ext {

// Returns a * b, and raises an error on overflow: an expanded view may have more elements than 63 bits can count.
inline int64_t checked_product(int64_t a, int64_t b) {
  int64_t product = 0;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &product), "peft_ext: a size of ", a, " times ", b,
                  ", wanted one that 63 bits hold");
  return product;
}

// Returns the size of a new tensor in bytes. Raises an error on a negative size and on overflow.
inline int64_t checked_bytes(const std::vector<int64_t>& shape, torch::headeronly::ScalarType type) {
  int64_t bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(static_cast<int32_t>(type)));
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(size >= 0, "peft_ext: a size of a new tensor is ", size, ", wanted 0 or more");
    bytes = checked_product(bytes, size);
  }
  return bytes;
}

inline std::vector<int64_t> row_major_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * (shape[d] > 1 ? shape[d] : 1);
  return strides;
}

inline bool has_sizes(const torch::stable::Tensor& tensor, const std::vector<int64_t>& sizes) {
  return std::equal(tensor.sizes().begin(), tensor.sizes().end(), sizes.begin(), sizes.end());
}

inline bool same_sizes(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin(), b.sizes().end());
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

// Returns an empty tensor of x's shape and dtype whose last dimension is contiguous. The strides are those of
// torch.empty_like(x) if the last dimension of empty_like(x) is contiguous, otherwise row-major strides.
inline torch::stable::Tensor like_with_whole_rows(const torch::stable::Tensor& x) {
  const torch::stable::Tensor y = torch::stable::empty_like(x);
  if (y.stride(x.dim() - 1) == 1) return y;
  return torch::stable::new_empty(x, {x.sizes().begin(), x.sizes().end()}, std::nullopt);
}

// Returns a view of the tensor in another shape with equally many elements.
inline torch::stable::Tensor as_shape(const torch::stable::Tensor& tensor, const std::vector<int64_t>& shape) {
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  if (!tensor.is_contiguous() || elements != tensor.numel()) return torch::stable::view(tensor, shape);
  AtenTensorHandle out = nullptr;  // offset 0 is relative to the tensor's storage offset
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(shape.size()), shape.data(),
                                                        row_major_strides(shape).data(), 0, &out));
  return torch::stable::Tensor(out);
}

// Returns a gradient in the shape and the dtype of its parameter.
inline torch::stable::Tensor like(const torch::stable::Tensor& gradient, const torch::stable::Tensor& parameter) {
  return as_shape(as_type(gradient, parameter.scalar_type()), {parameter.sizes().begin(), parameter.sizes().end()});
}

// Returns a new contiguous tensor, or nullopt if PyTorch fails; shim_message() then returns the reason. The caller must
// have checked the shape with checked_bytes().
inline std::optional<torch::stable::Tensor> try_empty(int32_t device_type, int32_t device_index,
                                                      const std::vector<int64_t>& shape,
                                                      torch::headeronly::ScalarType type) {
  AtenTensorHandle out = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), row_major_strides(shape).data(),
                               static_cast<int32_t>(type), device_type, device_index, &out) != TORCH_SUCCESS)
    return std::nullopt;
  return torch::stable::Tensor(out);
}

// Returns the message of the calling thread's last error in PyTorch's C shim. Returns "" on Windows, and on torch
// before 2.13, which has no function for the message.
inline std::string shim_message() {
#if defined(_WIN32)
  return "";
#else
  using Message = const char* (*)();
  static const auto message =
      reinterpret_cast<Message>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return message != nullptr ? message() : "";
#endif
}

// Returns whether the message of a failed allocation means a lack of memory. An empty message (on torch before 2.13, or
// on Windows) counts as a lack of memory, because the tensor's sizes were checked before.
inline bool tells_no_memory(const std::string& message) {
  if (message.empty()) return true;
  for (const char* words : {"out of memory", "can't allocate memory", "not enough memory", "bad_alloc"})
    if (message.find(words) != std::string::npos) return true;
  return false;
}

// Raises an error with the message unless tells_no_memory(message). bytes: the size of the tensor that could not be
// allocated.
inline void check_no_memory(const std::string& message, int64_t bytes) {
  STD_TORCH_CHECK(tells_no_memory(message), "peft_ext: no tensor of ", bytes, " bytes: ", message);
}

}  // namespace peft_ext
