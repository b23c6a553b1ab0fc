// peft_ext::nf4_dequantize on CUDA: one launch of the kernel in nf4.cuh, which other operators use too.
#include "nf4/cuda/nf4_weight.cuh"

namespace peft_ext {

Nf4View nf4_view(const Launcher& launcher, const DeviceWeight& weight) {
  Nf4View view{};
  view.packed = launcher.in<uint8_t>(weight.weight);
  view.absmax = launcher.in<void>(*weight.absmax);
  view.nested_absmax = launcher.in<float>(weight.nested_absmax);
  view.nested_code = launcher.in<float>(weight.nested_code);
  view.nested_offset = launcher.in<float>(weight.nested_offset);
  view.numel = weight.outputs * weight.inputs;
  while ((int64_t{1} << view.log2_blocksize) < weight.blocksize) ++view.log2_blocksize;
  return view;
}

Tensor dense_weight(const DeviceWeight& weight, ScalarType type, const Tensor* row_scale) {
  if (!weight.is_nf4()) return weight.weight;
  const Tensor out = device_empty(weight.weight, {weight.outputs, weight.inputs}, type);
  Launcher launcher(out);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    Nf4RowScale scale{};
    if (row_scale != nullptr)
      scale = {launcher.in<float>(*row_scale), static_cast<uint32_t>(weight.inputs / Nf4Vector<T>::kSize)};
    launcher(row_scale != nullptr ? nf4_dequantize_kernel<T, true> : nf4_dequantize_kernel<T, false>,
             ceil_div(out.numel(), kNf4BlockTile), kNf4Threads, nf4_view(launcher, weight), launcher.scratch<T>(out),
             scale);
  });
  return out;
}

namespace {

Tensor nf4_dequantize_cuda(const Tensor& weight, const std::optional<Tensor>& absmax,
                           const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                           const std::optional<Tensor>& nested_offset, int64_t blocksize,
                           const std::vector<int64_t>& shape, ScalarType dtype) {
  constexpr const char* kOp = "nf4_dequantize";
  const bool wide = dtype == ScalarType::Double;  // the result then has float32 values, for tests only
  if (!wide) check_kernel_dtype(kOp, "dtype", dtype);
  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  const DeviceWeight held =
      nf4_weight(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, numel, 1);
  const Tensor out = as_shape(dense_weight(held, wide ? ScalarType::Float : dtype), shape);
  return wide ? as_type(out, dtype) : out;
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) { m.impl("nf4_dequantize", TORCH_BOX(&peft_ext::nf4_dequantize_cuda)); }
