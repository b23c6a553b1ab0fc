// Quantizes or dequantizes one NF4 block in portable code, for the scalar path, and in the paths with vectors for
// incomplete blocks and, with AVX-512, for blocks that contain an infinity or a NaN. The kernels of each instruction
// set include this file after the target pragma, so that the compiler makes a copy for each instruction set.
#pragma once

#include "common/dtype.h"
#include "nf4/nf4_code.h"
#include "nf4/cpu/nf4_kernels.h"

namespace peft_ext {
namespace {

// Returns the largest magnitude, or NaN if a value is NaN, as in torch.amax.
template <typename T>
inline float block_absmax(const T* x, int64_t count) {
  float absmax = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float a = __builtin_fabsf(to_float(x[i]));
    if (a > absmax || a != a) absmax = a;
    if (absmax != absmax) break;
  }
  return absmax;
}

inline int nf4_encode(float scaled) {
  int code = 0;
  for (int i = 0; i < 15; ++i) code += !(nf4_threshold(i) >= scaled);
  return code;
}

// Writes the packed NF4 codes of scaled(value) for each of `count` values.
template <typename T, typename Scaled>
inline void encode_block(const T* x, int64_t count, const Scaled& scaled, uint8_t* packed) {
  for (int64_t i = 0; i < count; i += 2) {
    int codes[2] = {7, 7};
    for (int j = 0; j < 2 && i + j < count; ++j) codes[j] = nf4_encode(scaled(to_float(x[i + j])));
    packed[i / 2] = static_cast<uint8_t>(codes[0] << 4 | codes[1]);
  }
}

// Quantizes the incomplete last block of a tensor by bitsandbytes' rule: values are divided by the clamped absmax,
// which quantize_tail also stores. In a full block, values are multiplied by the reciprocal of the clamped absmax.
template <typename T>
inline void quantize_tail(const T* x, int64_t count, uint8_t* packed, float* absmax) {
  const float largest = block_absmax(x, count);
  *absmax = largest < kSmallestAbsmax ? kSmallestAbsmax : largest;
  encode_block(x, count, [&](float value) { return value / *absmax; }, packed);
}

// Dequantizes the elements [first, first + count) of the block that starts at `packed`. first is even.
template <typename T>
inline void dequantize_block(const uint8_t* packed, float absmax, int64_t first, int64_t count, T* out) {
  T table[16];
  for (int i = 0; i < 16; ++i) table[i] = from_float<T>(kNf4Code[i] * absmax);
  for (int64_t i = first; i < first + count; ++i) {
    const uint8_t byte = packed[i / 2];
    out[i] = table[i % 2 ? byte & 15 : byte >> 4];
  }
}

inline float decode_scale(const Nf4Scales& scales, int64_t i) {
  const float product = scales.code[scales.codes[i]] * scales.absmax[i / kNestedBlock];
  return product + scales.offset;
}

}  // namespace
}  // namespace peft_ext
