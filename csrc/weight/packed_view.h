// A packed weight as kernels see it, on the CPU and on CUDA: a matrix W [rows, columns] that is stored as codes and
// scales. What the parts, `group` and `option` mean is defined by the weight's format: see weight/formats/.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

#ifdef __CUDACC__
#define PEFT_EXT_BOTH __host__ __device__ inline
#else
#define PEFT_EXT_BOTH inline
#endif

namespace peft_ext {

constexpr int kWeightParts = 5;  // largest number of tensors of a packed weight

struct PackedView {
  const void* part[kWeightParts];  // null for a part that the weight does not have
  int64_t rows, columns;
  int64_t group;  // number of columns that share a scale; 0: all columns
  int option;     // see the functions below
};

// The operator's argument `layout` is group | number of the format << 32 | option << 40.
constexpr int kFormatShift = 32, kOptionShift = 40;

// The dtype in which a file stores scales.
enum class ScaleType : int { kF32 = 0, kBF16 = 1, kF16 = 2, kE8M0 = 3, kE4M3 = 4 };

// The order of 4-bit codes in bytes: the low or the high nibble of a byte is the even column, or the low nibbles of the
// 16 bytes of 32 columns are the first 16 columns.
enum class Nibbles : int { kLowFirst, kHighFirst, kHalves };

namespace {

// Fields of `layout`. The number is 0 for NF4 and for a dense weight.
PEFT_EXT_BOTH int64_t format_number(int64_t layout) { return layout >> kFormatShift & 0xff; }
PEFT_EXT_BOTH int64_t format_group(int64_t layout) { return layout & 0xffffffff; }
PEFT_EXT_BOTH int format_option(int64_t layout) { return static_cast<int>(layout >> kOptionShift); }

// Fields of `option`: bits 0 to 3: dtype of the scales; bits 4 to 7: bits of a code; bits 8 to 23: flags of the format.
PEFT_EXT_BOTH ScaleType scale_type(int option) { return static_cast<ScaleType>(option & 15); }
PEFT_EXT_BOTH int code_bits(int option) { return option >> 4 & 15; }
PEFT_EXT_BOTH int format_flags(int option) { return option >> 8; }

// Returns the value of an e8m0 byte: 2^(byte - 127), and NaN for 255.
PEFT_EXT_BOTH float e8m0_value(uint8_t byte) {
  const uint32_t bits = byte == 255 ? 0x7fc00000u : byte == 0 ? 0x00400000u : static_cast<uint32_t>(byte) << 23;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// Returns the value of an e4m3 byte (the variant without infinities: 0x7f and 0xff are NaN).
PEFT_EXT_BOTH float e4m3_value(uint8_t byte) {
  const uint32_t magnitude = byte & 0x7f, sign = static_cast<uint32_t>(byte & 0x80) << 24;
  uint32_t bits;
  float value;
  if (magnitude == 0x7f) {
    bits = 0x7fc00000u;
  } else if (magnitude < 8) {  // subnormal: a multiple of 2^-9
    value = static_cast<float>(magnitude) * 0x1p-9f;
    memcpy(&bits, &value, sizeof(bits));
  } else {
    bits = (magnitude << 20) + (120u << 23);
  }
  bits |= sign;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

PEFT_EXT_BOTH float half_value(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  uint32_t wide;
  float value;
  if (magnitude < 0x400) {
    value = static_cast<float>(magnitude) * 0x1p-24f;
    memcpy(&wide, &value, sizeof(wide));
  } else {
    wide = (magnitude << 13) + (magnitude >= 0x7c00 ? 224u << 23 : 112u << 23);
  }
  wide |= sign;
  memcpy(&value, &wide, sizeof(value));
  return value;
}

// Returns scale i of an array of scales.
PEFT_EXT_BOTH float scale_value(const void* scales, ScaleType type, int64_t i) {
  switch (type) {
    case ScaleType::kF32:
      return static_cast<const float*>(scales)[i];
    case ScaleType::kBF16: {
      const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(scales)[i]) << 16;
      float value;
      memcpy(&value, &bits, sizeof(value));
      return value;
    }
    case ScaleType::kF16:
      return half_value(static_cast<const uint16_t*>(scales)[i]);
    case ScaleType::kE8M0:
      return e8m0_value(static_cast<const uint8_t*>(scales)[i]);
    default:
      return e4m3_value(static_cast<const uint8_t*>(scales)[i]);
  }
}

constexpr float kE2m1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                             -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// The values of the 16 e2m1 codes are in this order: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same with a sign.
PEFT_EXT_BOTH float e2m1_value(int code) {
  const int magnitude = code & 7;
  const float value = magnitude < 4   ? 0.5f * static_cast<float>(magnitude)
                      : magnitude < 6 ? static_cast<float>(magnitude - 2)
                                      : static_cast<float>(2 * magnitude - 8);
  return code & 8 ? -value : value;
}

}  // namespace
}  // namespace peft_ext
