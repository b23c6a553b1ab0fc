// Functions on tensors that the CUDA operators share: checks whose errors name the operator and the argument, shapes,
// element types, and allocation.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/tensor_calls.h"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace peft_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises an error unless the element type is Float, BFloat16 or Half.
void check_kernel_dtype(const char* op, const char* argument, ScalarType type);

// Raises an error unless the tensor is on `like`'s device. name: the name of `like` in the error.
void check_same_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& like,
                       const char* name = "x");

// Raises an error unless the tensor has the element type and `elements` elements, and is on `like`'s device.
void check_tensor(const char* op, const char* argument, const Tensor& tensor, ScalarType type, int64_t elements,
                  const Tensor& like, const char* name = "x");

// Raises an error unless the matrix is Float, BFloat16 or Half and on `like`'s device.
void check_matrix(const char* op, const char* argument, const Tensor& matrix, const Tensor& like);

// Checks that a vector has `size` elements and is on `like`'s device. Returns the vector as contiguous float32.
Tensor device_vector(const char* op, const char* argument, const Tensor& vector, int64_t size, const Tensor& like);

// Returns the checked seed of dropout as a contiguous tensor, or nullopt if `seed` has no value. The seed is on
// `like`'s device or on the CPU. If `seed` has a value, device_seed raises an error for a dropout_p outside of 0 <= p
// < 1.
std::optional<Tensor> device_seed(const char* op, double dropout_p, const std::optional<Tensor>& seed,
                                  const Tensor& like);

// Returns "", or the reason why the device no longer works: an earlier kernel of any library failed.
inline const char* lost_device() {
#ifdef PEFT_EXT_EMULATE_CUDA
  return "";
#else
  return device_fault();
#endif
}

// Raises an error if the device no longer works.
void check_device();

// Allocates a tensor on `like`'s device. If memory is missing, the error contains the text of PyTorch's allocator
// error: trainers recognize by this text that a smaller batch would fit, and the stable ABI loses the text.
inline Tensor device_empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  const int64_t bytes = checked_bytes(shape, type);
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const std::optional<Tensor> tensor = try_empty(device_type, like.get_device_index(), shape, type);
  if (tensor.has_value()) return *tensor;
  const std::string message = shim_message();
  check_device();
  check_no_memory(message, bytes);
  STD_TORCH_CHECK(false, "CUDA out of memory. peft_ext wanted ", bytes, " bytes more");
}

inline Tensor device_empty_like(const Tensor& like) {
  return device_empty(like, {like.sizes().begin(), like.sizes().end()}, like.scalar_type());
}

inline Tensor device_zeros(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  Tensor zeros = device_empty(like, shape, type);
  TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(zeros.get()));
  return zeros;
}

// Returns the product of all sizes of the tensor except the last size.
inline int64_t device_rows(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows *= tensor.size(d);
  return rows;
}

inline int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

// Calls f with a zero whose C++ type is the element type that `type` names. Raises an error if the type is not Float,
// BFloat16 or Half.
template <typename F>
void with_type(ScalarType type, F f) {
  if (type == ScalarType::BFloat16) {
    f(bf16{});
  } else if (type == ScalarType::Half) {
    f(f16{});
  } else {
    STD_TORCH_CHECK(type == ScalarType::Float, "peft_ext: a kernel was asked for ", torch::headeronly::toString(type),
                    ", wanted Float, BFloat16 or Half");
    f(0.0f);
  }
}

inline DType dtype_of(ScalarType type) {
  return type == ScalarType::BFloat16 ? DType::kBF16 : type == ScalarType::Half ? DType::kF16 : DType::kF32;
}

inline bool aligned(const Tensor& tensor, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

// Returns whether kernels may move eight columns of the matrix at a time, in accesses of 16 bytes.
inline bool whole_columns(const Tensor& matrix, int64_t columns) {
  return columns % kVector == 0 && aligned(matrix, 16);
}

inline Tensor flat_rows(const Tensor& tensor) {
  return as_shape(as_contiguous(tensor), {device_rows(tensor), tensor.size(tensor.dim() - 1)});
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// Returns x's shape with the last size replaced by `last`.
std::vector<int64_t> shape_with_last(const Tensor& x, int64_t last);

}  // namespace peft_ext
