// Host functions for NF4 weights on CUDA: quantizing, views for kernels, and dequantizing a whole weight. dense_weight
// also takes weights in other packed formats.
#pragma once

#include <tuple>

#include "nf4/cuda/nf4.cuh"
#include "weight/device_weight.cuh"

namespace peft_ext {

Nf4View nf4_view(const Launcher& launcher, const DeviceWeight& weight);

// Returns [N, K] in `type`: the dense weight itself, or the decoded weight, which takes N K elements for as long as the
// caller holds the tensor. row_scale may be given for a packed weight; an NF4 weight must then have a K that is a
// multiple of 8. Row n is multiplied by row_scale[n] and rounded once.
Tensor dense_weight(const DeviceWeight& weight, ScalarType type, const Tensor* row_scale = nullptr);

// Returns packed codes and float32 scales of a weight of any shape, in float32, bfloat16, float16 or float64.
std::tuple<Tensor, Tensor> nf4_quantized(const Tensor& weight, int64_t blocksize);

}  // namespace peft_ext
