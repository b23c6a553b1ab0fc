// One wrapper per device instruction that plain C++ has no word for. Torch-free. Outside nvcc (PEFT_EXT_EMULATE_CUDA,
// with a header that stands in for cuda_runtime.h included first) each takes a body of plain C++, so that the same
// kernels run on a CPU.
#pragma once

#ifndef PEFT_EXT_EMULATE_CUDA
#include <cuda_runtime.h>
#endif

#include <stdint.h>

#include "common/dtype.h"

namespace peft_ext {

constexpr int kWarpSize = 32;

// Products and sums that the compiler may not contract to an FMA.
__device__ __forceinline__ float fmul_rn(float a, float b) {
#ifdef __CUDACC__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

__device__ __forceinline__ float fadd_rn(float a, float b) {
#ifdef __CUDACC__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// The value that lane `source` of this lane's group of `width` holds; its low bits count. All 32 lanes call it.
__device__ __forceinline__ float shuffle(float value, int source, int width = kWarpSize) {
  return __shfl_sync(0xffffffffu, value, source, width);
}

// ld.global.cs: a load that leaves the caches first, as nobody reads this again soon.
template <typename T>
__device__ __forceinline__ T load_streaming(const T* from) {
#ifdef __CUDACC__
  return __ldcs(from);
#else
  return *from;
#endif
}

// cvt.rn.{bf16x2,f16x2}.f32: two floats rounded to nearest even, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
#ifdef __CUDACC__
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return from_float<bf16>(low).bits | static_cast<uint32_t>(from_float<bf16>(high).bits) << 16;
#endif
}

template <>
__device__ __forceinline__ uint32_t pack2<f16>(float low, float high) {
#ifdef __CUDACC__
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return from_float<f16>(low).bits | static_cast<uint32_t>(from_float<f16>(high).bits) << 16;
#endif
}

}  // namespace peft_ext
