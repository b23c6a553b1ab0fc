// peft_ext::nf4_dequantize on CUDA, for NF4 and the other packed formats: one launch of the kernel in nf4.cuh or of the
// kernel in packed.cuh. Other operators decode a whole weight by a launch of one of these kernels.
#include "nf4/cuda/nf4_weight.cuh"
#include "packed/cuda/packed_weight.cuh"

namespace peft_ext {

Nf4View nf4_view(const Launcher& launcher, const DeviceWeight& weight) {
  Nf4View view{};
  view.packed = launcher.in<uint8_t>(weight.weight);
  view.absmax = launcher.in<void>(*weight.parts[0]);
  view.nested_absmax = launcher.in<float>(weight.parts[1]);
  view.nested_code = launcher.in<float>(weight.parts[2]);
  view.nested_offset = launcher.in<float>(weight.parts[3]);
  view.numel = weight.outputs * weight.inputs;
  while ((int64_t{1} << view.log2_blocksize) < weight.blocksize()) ++view.log2_blocksize;
  return view;
}

Tensor dense_weight(const DeviceWeight& weight, ScalarType type, const Tensor* row_scale) {
  if (!weight.is_packed()) return weight.weight;
  if (!weight.is_nf4()) return packed_dense(weight, type, row_scale);
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

Tensor nf4_dequantize_cuda(const Tensor& weight, const std::optional<Tensor>& part1, const std::optional<Tensor>& part2,
                           const std::optional<Tensor>& part3, const std::optional<Tensor>& part4, int64_t layout,
                           const std::vector<int64_t>& shape, ScalarType dtype) {
  constexpr const char* kOp = "nf4_dequantize";
  const bool wide = dtype == ScalarType::Double;  // float64 results are for tests only, and are converted from float32
  if (!wide) check_kernel_dtype(kOp, "dtype", dtype);
  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  const DeviceParts parts{part1, part2, part3, part4};
  const DeviceWeight held = format_number(layout) != 0 ? device_weight(kOp, weight, parts, layout, shape, dtype)
                                                       : nf4_weight(kOp, weight, parts, layout, numel, 1);
  const Tensor out = as_shape(dense_weight(held, wide ? ScalarType::Float : dtype), shape);
  return wide ? as_type(out, dtype) : out;
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) { m.impl("nf4_dequantize", PEFT_EXT_CUDA_BOX(&peft_ext::nf4_dequantize_cuda)); }
