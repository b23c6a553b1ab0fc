// Checks the tensors, the layout and the shape that an operator on CUDA gets for a frozen weight. See
// device_weight.cuh.
#include "weight/device_weight.cuh"

#include "weight/format_check.h"

namespace peft_ext {

DeviceWeight nf4_weights(const char* op, const Tensor& weight, const DeviceParts& parts, int64_t layout, int64_t count,
                         int64_t outputs, int64_t inputs) {
  const std::optional<Tensor>&absmax = parts[0], &nested_absmax = parts[1], &nested_code = parts[2],
        &nested_offset = parts[3];
  STD_TORCH_CHECK(on_device(weight), op, ": weight is not on a CUDA device");
  STD_TORCH_CHECK(absmax.has_value(), op, ": absmax is None, wanted the scales of an NF4 weight");
  STD_TORCH_CHECK(is_blocksize(layout), op, ": blocksize is ", layout, ", wanted a power of two from ", kSmallestBlock,
                  " to ", kLargestBlock);
  const bool nested = nested_absmax.has_value();
  STD_TORCH_CHECK(nested == nested_code.has_value() && nested == nested_offset.has_value(), op,
                  ": of nested_absmax, nested_code and nested_offset some are None, wanted all or none");
  DeviceWeight held;
  held.layout = layout;
  held.outputs = outputs;
  held.inputs = inputs;
  const auto checked = [&](const char* name, const Tensor& tensor, ScalarType wanted, int64_t elements) {
    check_tensor(op, name, tensor, wanted, elements, weight, "weight");
    return as_contiguous(tensor);
  };
  const int64_t scales = held.scales();
  held.weight = checked("weight", weight, ScalarType::Byte, count * held.codes());
  held.parts[0] = checked("absmax", *absmax, nested ? ScalarType::Byte : ScalarType::Float, count * scales);
  if (nested) {
    held.parts[1] = checked("nested_absmax", *nested_absmax, ScalarType::Float, count * ceil_div(scales, kNestedBlock));
    held.parts[2] = checked("nested_code", *nested_code, ScalarType::Float, kNestedCodes);
    held.parts[3] = checked("nested_offset", *nested_offset, ScalarType::Float, count);
  }
  return held;
}

DeviceWeight nf4_weight(const char* op, const Tensor& weight, const DeviceParts& parts, int64_t layout, int64_t outputs,
                        int64_t inputs) {
  DeviceWeight held = nf4_weights(op, weight, parts, layout, 1, outputs, inputs);
  if (!aligned(held.weight, 8)) held.weight = torch::stable::clone(held.weight);
  return held;
}

DeviceWeight packed_weights(const char* op, const Tensor& weight, const DeviceParts& parts, int64_t layout,
                            int64_t count, int64_t outputs, int64_t inputs) {
  STD_TORCH_CHECK(on_device(weight), op, ": weight is not on a CUDA device");
  checked_bytes({count, outputs, inputs}, ScalarType::Byte);  // raises an error on negative sizes and on overflow
  STD_TORCH_CHECK(inputs < int64_t{1} << 32, op, ": weight has ", inputs, " columns, wanted fewer than 2^32");
  check_format(
      op, layout, count, outputs, inputs, "weight's device",
      [&](int part) { return part == 0 ? weight : parts[static_cast<size_t>(part - 1)]; },
      [&](const Tensor& tensor) { return same_device(tensor, weight); });
  DeviceWeight held;
  held.layout = layout;
  held.outputs = outputs;
  held.inputs = inputs;
  const auto usable = [](const Tensor& tensor) {
    const Tensor dense = as_contiguous(tensor);
    return aligned(dense, 16) ? dense : torch::stable::clone(dense);
  };
  held.weight = usable(weight);
  for (size_t i = 0; i < held.parts.size(); ++i)
    if (parts[i].has_value()) held.parts[i] = usable(*parts[i]);
  return held;
}

DeviceWeight device_weight(const char* op, const Tensor& weight, const DeviceParts& parts, int64_t layout,
                           const std::vector<int64_t>& shape, ScalarType type) {
  STD_TORCH_CHECK(on_device(weight), op, ": weight is not on a CUDA device");
  STD_TORCH_CHECK(shape.size() == 2, op, ": weight has ", shape.size(), " dimensions, wanted [N, K]");
  if (format_number(layout) != 0) return packed_weights(op, weight, parts, layout, 1, shape[0], shape[1]);
  if (layout != 0 || parts[0].has_value()) return nf4_weight(op, weight, parts, layout, shape[0], shape[1]);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == shape[0] && weight.size(1) == shape[1], op,
                  ": weight is not [", shape[0], ", ", shape[1], "]");
  STD_TORCH_CHECK(weight.scalar_type() == type, op, ": weight is ", torch::headeronly::toString(weight.scalar_type()),
                  ", x is ", torch::headeronly::toString(type));
  DeviceWeight held;
  held.weight = weight;
  held.outputs = shape[0];
  held.inputs = shape[1];
  return held;
}

}  // namespace peft_ext
