// A packed weight as kernels see it, on the CPU and on CUDA: a matrix W [rows, columns] that is stored as codes and
// scales. The weight's format defines what the parts, `group` and `option` mean: see weight/formats/.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace peft_ext {

constexpr int kWeightParts = 5;  // largest number of tensors of a packed weight

struct PackedView {
  const void* part[kWeightParts];  // the weight's tensors; null for a tensor that the weight does not have
  int64_t rows, columns;
  int64_t group;  // in most formats the number of columns that share a scale, 0 for all columns
  int option;     // bit fields, which the functions below read
};

// The operator's argument `layout` is group | number of the format << 32 | option << 40.
constexpr int kFormatShift = 32, kOptionShift = 40;

// The dtypes in which a checkpoint's file can store scales.
enum class ScaleType : int { kF32 = 0, kBF16 = 1, kF16 = 2, kE8M0 = 3, kE4M3 = 4 };

// The order of 4-bit codes in bytes: the low or the high nibble of a byte is the even column, or the low nibbles of the
// 16 bytes of 32 columns are the first 16 columns.
enum class Nibbles : int { kLowFirst, kHighFirst, kHalves };

namespace {

// Returns the address of a part that the weight has. An empty tensor may have a null address; part_address then returns
// another address, which is never read.
inline const void* part_address(const void* data) { return data != nullptr ? data : &kWeightParts; }

// format_number, format_group and format_option return the fields of `layout`. The number of the format is 0 for NF4
// and for a dense weight.
inline int64_t format_number(int64_t layout) { return layout >> kFormatShift & 0xff; }
inline int64_t format_group(int64_t layout) { return layout & 0xffffffff; }
inline int format_option(int64_t layout) { return static_cast<int>(layout >> kOptionShift); }

// Fields of `option`: bits 0 to 3: dtype of the scales; bits 4 to 7: bits of a code; bits 8 to 23: flags of the format.
inline ScaleType scale_type(int option) { return static_cast<ScaleType>(option & 15); }
inline int code_bits(int option) { return option >> 4 & 15; }
inline int format_flags(int option) { return option >> 8; }

// Returns the value of an e8m0 byte: 2^(byte - 127), and NaN for 255.
inline float e8m0_value(uint8_t byte) {
  return bits_to_float(byte == 255 ? 0x7fc00000u : byte == 0 ? 0x00400000u : static_cast<uint32_t>(byte) << 23);
}

// Returns the value of an e4m3 code (the variant without infinities: 0x7f and 0xff are NaN). From magnitude 8 on, the
// bits of a code are the bits of a float32, apart from the bias of the exponent. A magnitude below 8 is subnormal:
// e4m3_value makes the bits of 2^-6 + value, and then subtracts 2^-6.
inline float e4m3_value(uint32_t code) {
  const uint32_t magnitude = code & 0x7f;
  const uint32_t subnormal = 0u - ((magnitude - 8) >> 31), nan = 0u - ((magnitude + 1) >> 7);
  const uint32_t bits = (magnitude << 20) + (120u << 23) - (subnormal << 23);
  const float value = bits_to_float(bits | (nan & 0x7fc00000u)) - bits_to_float(subnormal & 0x3c800000u);
  return bits_to_float(float_to_bits(value) | (code & 0x80) << 24);
}

// Returns scale i of an array of scales, as float32.
inline float scale_value(const void* scales, ScaleType type, int64_t i) {
  switch (type) {
    case ScaleType::kF32:
      return static_cast<const float*>(scales)[i];
    case ScaleType::kBF16:
      return to_float(static_cast<const bf16*>(scales)[i]);
    case ScaleType::kF16:
      return to_float(static_cast<const f16*>(scales)[i]);
    case ScaleType::kE8M0:
      return e8m0_value(static_cast<const uint8_t*>(scales)[i]);
    default:
      return e4m3_value(static_cast<const uint8_t*>(scales)[i]);
  }
}

// The values of the 16 e2m1 codes.
constexpr float kE2m1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                             -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

}  // namespace
}  // namespace peft_ext
