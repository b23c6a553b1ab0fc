// peft_ext::nf4_dequantize for CUDA: checks what came, and launches one kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/launch.cuh"
#include "nf4/nf4.cuh"

namespace peft_ext {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// `tensor`, dense: as it is in practice, a copy otherwise.
Tensor checked(const char* name, const Tensor& tensor, ScalarType dtype, int64_t numel, const Tensor& weight) {
  STD_TORCH_CHECK(on_device(tensor) && tensor.get_device_index() == weight.get_device_index(), "nf4_dequantize: ", name,
                  " is on another device than weight, wanted cuda:", weight.get_device_index());
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.numel() == numel, "nf4_dequantize: ", name, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), " with ", tensor.numel(), " elements, wanted ",
                  torch::headeronly::toString(dtype), " with ", numel);
  return torch::stable::contiguous(tensor);
}

template <typename T>
void launch(const Launcher& launcher, const Nf4View& view, const Tensor& out) {
  const int64_t blocks = ceil_div(view.numel, kNf4BlockTile);
  launcher(nf4_dequantize_kernel<T>, blocks, kNf4Threads, view, launcher.scratch<T>(out));
}

Tensor nf4_dequantize_cuda(const Tensor& weight, const std::optional<Tensor>& absmax,
                           const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                           const std::optional<Tensor>& nested_offset, int64_t blocksize,
                           const std::vector<int64_t>& shape, ScalarType dtype) {
  STD_TORCH_CHECK(on_device(weight), "nf4_dequantize: weight is not on a CUDA device");
  STD_TORCH_CHECK(absmax.has_value(), "nf4_dequantize: absmax is None, wanted the scales of an NF4 weight");
  STD_TORCH_CHECK(blocksize >= kNf4Group && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0,
                  "nf4_dequantize: blocksize is ", blocksize, ", wanted a power of two from 32 to 4096");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                      dtype == ScalarType::Double,
                  "nf4_dequantize: dtype is ", torch::headeronly::toString(dtype),
                  ", wanted Float, BFloat16, Half or Double");
  const bool nested = nested_absmax.has_value();
  STD_TORCH_CHECK(nested == nested_code.has_value() && nested == nested_offset.has_value(),
                  "nf4_dequantize: of nested_absmax, nested_code and nested_offset some are None, wanted all or none");

  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  const int64_t scales = ceil_div(numel, blocksize);
  Tensor packed = checked("weight", weight, ScalarType::Byte, ceil_div(numel, 2), weight);
  if (reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 4 != 0) packed = torch::stable::clone(packed);
  const Tensor scale = checked("absmax", *absmax, nested ? ScalarType::Byte : ScalarType::Float, scales, weight);

  const Launcher launcher(weight);
  Nf4View view{};
  view.packed = launcher.in<uint8_t>(packed);
  view.absmax = launcher.in<void>(scale);
  view.numel = numel;
  while ((int64_t{1} << view.log2_blocksize) < blocksize) ++view.log2_blocksize;
  // Held until the launch: a copy that checked() made must not be freed, and its memory not be given out, before it.
  Tensor held[3];
  if (nested) {
    const int64_t groups = ceil_div(scales, int64_t{1} << kNf4Log2NestedBlock);
    held[0] = checked("nested_absmax", *nested_absmax, ScalarType::Float, groups, weight);
    held[1] = checked("nested_code", *nested_code, ScalarType::Float, 256, weight);
    held[2] = checked("nested_offset", *nested_offset, ScalarType::Float, 1, weight);
    view.nested_absmax = launcher.in<float>(held[0]);
    view.nested_code = launcher.in<float>(held[1]);
    view.nested_offset = launcher.in<float>(held[2]);
  }

  const bool wide = dtype == ScalarType::Double;  // the float32 value in a wider type: for checks, not for speed
  const Tensor out = torch::stable::new_empty(weight, shape, wide ? ScalarType::Float : dtype);
  if (dtype == ScalarType::BFloat16) {
    launch<bf16>(launcher, view, out);
  } else if (dtype == ScalarType::Half) {
    launch<f16>(launcher, view, out);
  } else {
    launch<float>(launcher, view, out);
  }
  return wide ? torch::stable::to(out, dtype) : out;
}

PEFT_EXT_CUDA_LIBRARY(m) { m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize_cuda)); }

}  // namespace
}  // namespace peft_ext
