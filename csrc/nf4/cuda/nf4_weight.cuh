// NF4 weights on a GPU: quantized, viewed by kernels, decoded whole.
#pragma once

#include <tuple>

#include "nf4/cuda/nf4.cuh"
#include "weight/device_weight.cuh"

namespace peft_ext {

Nf4View nf4_view(const Launcher& launcher, const DeviceWeight& weight);

// [N, K] in `type`: the dense weight itself, or the NF4 weight dequantized; of an NF4 weight with K a multiple of 8,
// row n times row_scale[n], where that is given, rounded once.
Tensor dense_weight(const DeviceWeight& weight, ScalarType type, const Tensor* row_scale = nullptr);

// Packed codes and float32 scales of a weight of any float type and shape.
std::tuple<Tensor, Tensor> nf4_quantized(const Tensor& weight, int64_t blocksize);

}  // namespace peft_ext
