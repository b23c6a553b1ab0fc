// A frozen weight as the CUDA operators receive it: dense [N, K], or NF4 in bitsandbytes' layout.
#pragma once

#include "cuda/tensor.cuh"
#include "weight/nf4_layout.h"

namespace peft_ext {

struct DeviceWeight {
  Tensor weight;                 // dense [N, K] of x's type, of any strides, or packed uint8
  std::optional<Tensor> absmax;  // none: dense
  std::optional<Tensor> nested_absmax, nested_code, nested_offset;
  int64_t blocksize = 0, outputs = 0, inputs = 0;

  bool is_nf4() const { return absmax.has_value(); }
  // Of an NF4 weight: bytes, and scales.
  int64_t codes() const { return ceil_div(outputs * inputs, 2); }
  int64_t scales() const { return ceil_div(outputs * inputs, blocksize); }
};

// The weight, of the device and the sizes and types that its shape asks for, aligned; an error that names op and
// argument otherwise. type: that of x, which a dense weight must have.
DeviceWeight device_weight(const char* op, const Tensor& weight, const std::optional<Tensor>& absmax,
                           const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                           const std::optional<Tensor>& nested_offset, int64_t blocksize,
                           const std::vector<int64_t>& shape, ScalarType type);

// The same of an NF4 weight alone, [outputs, inputs] or any other shape of as many elements.
DeviceWeight nf4_weight(const char* op, const Tensor& weight, const std::optional<Tensor>& absmax,
                        const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                        const std::optional<Tensor>& nested_offset, int64_t blocksize, int64_t outputs, int64_t inputs);

// The same of `count` NF4 weights of one shape, each packed for itself, the parts of all one after the other: what is
// returned has the sizes of one, and points to the first's.
DeviceWeight nf4_weights(const char* op, const Tensor& weight, const std::optional<Tensor>& absmax,
                         const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                         const std::optional<Tensor>& nested_offset, int64_t blocksize, int64_t count, int64_t outputs,
                         int64_t inputs);

}  // namespace peft_ext
