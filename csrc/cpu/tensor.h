// Functions on tensors that the CPU operators share: element types, allocation, and PyTorch's matrix product.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <vector>

#include "common/dtype.h"
#include "common/tensor_calls.h"

namespace peft_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const char* op, const char* argument, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::BFloat16:
      return DType::kBF16;
    case ScalarType::Half:
      return DType::kF16;
    default:
      STD_TORCH_CHECK(false, op, ": ", argument, " is ", torch::headeronly::toString(type),
                      ", wanted Float, BFloat16 or Half");
  }
}

inline DType dtype_of(const char* op, const char* argument, const Tensor& tensor) {
  return dtype_of(op, argument, tensor.scalar_type());
}

// Asks Linux for huge pages for a large result or block of scratch, before the memory is touched for the first time. In
// each call a large result is new memory, and page faults of 4 KiB would take a large part of the call's time.
// advise_huge_pages does nothing for less than 4 MiB, or if the system has no MADV_HUGEPAGE.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  if (bytes < 2 * kPage) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// Allocates a tensor. If memory is missing, the error contains the text of PyTorch's allocator error: trainers
// recognize by this text that a smaller batch would fit, and the stable ABI loses the text.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType type) {
  const int64_t bytes = checked_bytes(shape, type);
  const std::optional<Tensor> tensor = try_empty(aoti_torch_device_type_cpu(), 0, shape, type);
  if (!tensor.has_value()) {
    check_no_memory(shim_message(), bytes);
    STD_TORCH_CHECK(false, "DefaultCPUAllocator: can't allocate memory: peft_ext wanted ", bytes, " bytes");
  }
  advise_huge_pages(tensor->mutable_data_ptr(), static_cast<size_t>(bytes));
  return *tensor;
}

// Returns the product of all sizes of the tensor except the last size.
inline int64_t rows_of(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows = checked_product(rows, tensor.size(d));
  return rows;
}

// Returns x's shape with the last size replaced by `last`.
inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = last;
  return shape;
}

// Computes out [T, N] = beta * out + a [T, K] b [K, N] by PyTorch's matrix product, in place.
inline void addmm_(const Tensor& out, const Tensor& a, const Tensor& b, double beta) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, 1.0));
}

// Computes out [T, N] = a [T, K] b [K, N] by PyTorch's matrix product.
inline void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

}  // namespace peft_ext
