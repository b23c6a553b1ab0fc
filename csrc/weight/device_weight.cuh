// A frozen weight as an argument of a CUDA operator: dense [N, K], or NF4 in bitsandbytes' layout.
#pragma once

#include "cuda/tensor.cuh"
#include "weight/nf4_layout.h"

namespace peft_ext {

struct DeviceWeight {
  Tensor weight;                 // dense weight [N, K] with any strides, or packed NF4 codes as uint8
  std::optional<Tensor> absmax;  // scales of an NF4 weight; nullopt for a dense weight
  std::optional<Tensor> nested_absmax, nested_code, nested_offset;
  int64_t blocksize = 0, outputs = 0, inputs = 0;

  bool is_nf4() const { return absmax.has_value(); }
  // codes() returns the number of bytes of an NF4 weight's codes; scales() returns the number of the weight's scales.
  int64_t codes() const { return ceil_div(outputs * inputs, 2); }
  int64_t scales() const { return ceil_div(outputs * inputs, blocksize); }
};

// Checks a weight and returns the weight. The returned NF4 codes are aligned to 8 bytes. The error of a wrong device,
// size or dtype names op and argument. `type` is the dtype that a dense weight must have.
DeviceWeight device_weight(const char* op, const Tensor& weight, const std::optional<Tensor>& absmax,
                           const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                           const std::optional<Tensor>& nested_offset, int64_t blocksize,
                           const std::vector<int64_t>& shape, ScalarType type);

// Checks an NF4 weight as device_weight does, and returns the weight. The shape is [outputs, inputs], or any shape with
// equally many elements.
DeviceWeight nf4_weight(const char* op, const Tensor& weight, const std::optional<Tensor>& absmax,
                        const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                        const std::optional<Tensor>& nested_offset, int64_t blocksize, int64_t outputs, int64_t inputs);

// Checks `count` stacked NF4 weights of one shape, whose tensors are concatenated. In the result, `outputs` and
// `inputs` are the sizes of one weight, and the tensors hold all weights.
DeviceWeight nf4_weights(const char* op, const Tensor& weight, const std::optional<Tensor>& absmax,
                         const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                         const std::optional<Tensor>& nested_offset, int64_t blocksize, int64_t count, int64_t outputs,
                         int64_t inputs);

}  // namespace peft_ext
