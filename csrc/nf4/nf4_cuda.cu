// peft_ext::nf4_dequantize for CUDA: one launch, of the pass that products take as well.
#include "linear/passes_cuda.h"

namespace peft_ext {
namespace {

Tensor nf4_dequantize_cuda(const Tensor& weight, const std::optional<Tensor>& absmax,
                           const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                           const std::optional<Tensor>& nested_offset, int64_t blocksize,
                           const std::vector<int64_t>& shape, ScalarType dtype) {
  constexpr const char* kOp = "nf4_dequantize";
  const bool wide = dtype == ScalarType::Double;  // the float32 value in a wider type: for checks, not for speed
  if (!wide) check_kernel_dtype(kOp, "dtype", dtype);
  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  const DeviceWeight held =
      nf4_weight(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, numel, 1);
  const Tensor out = torch::stable::view(dense_weight(held, wide ? ScalarType::Float : dtype), shape);
  return wide ? torch::stable::to(out, dtype) : out;
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) { m.impl("nf4_dequantize", TORCH_BOX(&peft_ext::nf4_dequantize_cuda)); }
