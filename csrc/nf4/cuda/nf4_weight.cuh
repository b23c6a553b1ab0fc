// Declares host functions for NF4 weights on CUDA, which quantize a weight, make views for kernels, and dequantize a
// whole weight. dense_weight also decodes weights in other packed formats.
#pragma once

#include <tuple>

#include "nf4/cuda/nf4.cuh"
#include "weight/device_weight.cuh"

namespace peft_ext {

Nf4View nf4_view(const Launcher& launcher, const DeviceWeight& weight);

// Returns the weight [N, K] in `type`: a dense weight itself, or the decoded copy of a packed weight. The copy's N K
// elements stay in memory as long as the caller holds the tensor. row_scale may be given only for a packed weight, and
// for an NF4 weight only if K is a multiple of 8. With row_scale, row n of the copy is multiplied by row_scale[n] and
// rounded once.
Tensor dense_weight(const DeviceWeight& weight, ScalarType type, const Tensor* row_scale = nullptr);

// Quantizes a weight of any shape, in float32, bfloat16, float16 or float64, and returns the packed codes and the
// float32 scales.
std::tuple<Tensor, Tensor> nf4_quantized(const Tensor& weight, int64_t blocksize);

}  // namespace peft_ext
