// A frozen weight as an argument of a CUDA operator: dense [N, K], or packed. The formats of packed weights are NF4, in
// bitsandbytes' layout, and those of weight/formats/list.h.
#pragma once

#include "cuda/tensor.cuh"
#include "weight/nf4_layout.h"
#include "weight/packed_view.h"

namespace peft_ext {

// The tensors of a packed weight after the first; of NF4: absmax, nested_absmax, nested_code, nested_offset.
using DeviceParts = std::vector<std::optional<Tensor>>;

struct DeviceWeight {
  Tensor weight;  // dense weight [N, K] with any strides, or the first part of a packed weight
  DeviceParts parts = DeviceParts(kWeightParts - 1);
  int64_t layout = 0;  // 0 for a dense weight; for a packed weight see packed_view.h
  int64_t outputs = 0, inputs = 0;

  bool is_packed() const { return layout != 0; }
  bool is_nf4() const { return is_packed() && format_number(layout) == 0; }
  int64_t blocksize() const { return format_group(layout); }  // number of elements per block of an NF4 weight
  // codes() returns the number of bytes of an NF4 weight's codes; scales() returns the number of the weight's scales.
  int64_t codes() const { return ceil_div(outputs * inputs, 2); }
  int64_t scales() const { return ceil_div(outputs * inputs, blocksize()); }
};

// Checks the tensors, the layout and the shape of a weight, and returns the weight. The returned NF4 codes are aligned
// to 8 bytes, and each part of another packed format is contiguous and aligned to 16 bytes. The error of a wrong
// device, size or dtype names op and argument. `type` is the dtype that a dense weight must have.
DeviceWeight device_weight(const char* op, const Tensor& weight, const DeviceParts& parts, int64_t layout,
                           const std::vector<int64_t>& shape, ScalarType type);

// Checks an NF4 weight as device_weight does, and returns the weight. The shape is [outputs, inputs], or any shape with
// equally many elements.
DeviceWeight nf4_weight(const char* op, const Tensor& weight, const DeviceParts& parts, int64_t layout, int64_t outputs,
                        int64_t inputs);

// nf4_weights checks `count` stacked NF4 weights of one shape, and packed_weights checks `count` stacked weights of one
// shape in a format of weight/formats/list.h. Each tensor is the concatenation of the weights' tensors, except
// nested_code, which all NF4 weights share. In the result, `outputs` and `inputs` are the sizes of one weight, and the
// tensors hold all weights.
DeviceWeight nf4_weights(const char* op, const Tensor& weight, const DeviceParts& parts, int64_t layout, int64_t count,
                         int64_t outputs, int64_t inputs);
DeviceWeight packed_weights(const char* op, const Tensor& weight, const DeviceParts& parts, int64_t layout,
                            int64_t count, int64_t outputs, int64_t inputs);

}  // namespace peft_ext
