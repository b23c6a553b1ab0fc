// Host functions for NF4 weights on CUDA: quantizing, views for kernels, and dequantizing a whole weight.
#pragma once

#include <tuple>

#include "nf4/cuda/nf4.cuh"
#include "weight/device_weight.cuh"

namespace peft_ext {

Nf4View nf4_view(const Launcher& launcher, const DeviceWeight& weight);

// Returns [N, K] in `type`: the dense weight itself, or the dequantized NF4 weight. For an NF4 weight with K a multiple
// of 8, row_scale may be given: row n is multiplied by row_scale[n] and rounded once.
Tensor dense_weight(const DeviceWeight& weight, ScalarType type, const Tensor* row_scale = nullptr);

// Returns packed codes and float32 scales of a weight of any shape, in float32, bfloat16, float16 or float64.
std::tuple<Tensor, Tensor> nf4_quantized(const Tensor& weight, int64_t blocksize);

}  // namespace peft_ext
