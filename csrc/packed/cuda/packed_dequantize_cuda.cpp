// Decodes whole packed weights on CUDA, by one launch of the kernel in packed.cuh.
#include "packed/cuda/packed.cuh"
#include "packed/cuda/packed_weight.cuh"

namespace peft_ext {

PackedView packed_view(const Launcher& launcher, const DeviceWeight& weight) {
  PackedView view{};
  view.part[0] = launcher.in<void>(weight.weight);
  for (size_t part = 1; part < kWeightParts; ++part) view.part[part] = launcher.in<void>(weight.parts[part - 1]);
  view.rows = weight.outputs;
  view.columns = weight.inputs;
  view.group = format_group(weight.layout);
  view.option = format_option(weight.layout);
  return view;
}

namespace {

void decode(const DeviceWeight& weight, ScalarType type, const Tensor* row_scale, int64_t count, const Tensor& out) {
  if (out.numel() == 0) return;
  Launcher launcher(out);
  PackedDecode work{};
  work.weight = packed_view(launcher, weight);
  for (size_t part = 0; part < kWeightParts; ++part) {
    const std::optional<Tensor> tensor = part == 0 ? weight.weight : weight.parts[part - 1];
    if (!tensor.has_value()) continue;
    work.apart[part] = tensor->numel() * static_cast<int64_t>(tensor->element_size()) / count;
  }
  if (row_scale != nullptr) work.row_scale = launcher.in<float>(*row_scale);
  with_format(format_number(weight.layout), [&](auto number) {
    with_type(type, [&](auto zero) {
      using T = decltype(zero);
      const int64_t blocks = ceil_div(weight.outputs, kPackedRows) * ceil_div(weight.inputs, kPackedColumns);
      launcher(packed_dequantize_kernel<decltype(number)::value, T>, {blocks, count}, kPackedThreads, work,
               launcher.scratch<T>(out));
    });
  });
}

}  // namespace

Tensor packed_dense(const DeviceWeight& weight, ScalarType type, const Tensor* row_scale) {
  const Tensor out = device_empty(weight.weight, {weight.outputs, weight.inputs}, type);
  decode(weight, type, row_scale, 1, out);
  return out;
}

Tensor packed_dense_stack(const DeviceWeight& weight, ScalarType type, int64_t count) {
  const Tensor out = device_empty(weight.weight, {count, weight.outputs, weight.inputs}, type);
  decode(weight, type, nullptr, count, out);
  return out;
}

}  // namespace peft_ext
