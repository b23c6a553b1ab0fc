// Element types that the kernels read and write, and the scalar conversions of these types. The file does not depend on
// torch. All functions have internal linkage, so that the linker never merges code for one instruction set with code
// for another instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

namespace peft_ext {

enum class DType : int { kF32 = 0, kBF16 = 1, kF16 = 2 };

// bf16 and f16 are distinct types, so that a template on the element type can tell bfloat16 from float16.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

namespace {

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(f16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  // Multiplying by 2^-24 avoids subnormal float32 numbers, which the thread may be set to flush to zero.
  if (magnitude < 0x400) return bits_to_float(sign | float_to_bits(static_cast<float>(magnitude) * 0x1p-24f));
  // The exponent biases of float16 and float32 differ by 112; infinity and NaN have the largest exponent in both types.
  return bits_to_float(sign | ((magnitude << 13) + (magnitude >= 0x7c00 ? 224u << 23 : 112u << 23)));
}

// Converts a float32 value to T. For bf16 and f16, from_float rounds to nearest, ties to even, and turns a NaN into the
// quiet NaN that PyTorch stores.
template <typename T>
inline T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline bf16 from_float<bf16>(float value) {
  if (value != value) return bf16{0x7fc0};
  const uint32_t bits = float_to_bits(value);
  return bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <>
inline f16 from_float<f16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return f16{static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return f16{static_cast<uint16_t>(sign | 0x7c00)};  // the value rounds to infinity
  if (magnitude < 0x38800000) {
    // The float16 result is subnormal or zero: adding 0.5 leaves the multiple of 2^-24 in the sum's low mantissa bits.
    const uint32_t shifted = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
    return f16{static_cast<uint16_t>(sign | shifted)};
  }
  const uint32_t rebiased = magnitude - 0x38000000;
  return f16{static_cast<uint16_t>(sign | ((rebiased + 0xfff + ((rebiased >> 13) & 1)) >> 13))};
}

// Calls f with a zero whose C++ type is the element type that `dtype` names.
template <typename F>
inline void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kF32:
      return f(float{});
    case DType::kBF16:
      return f(bf16{});
    case DType::kF16:
      return f(f16{});
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

}  // namespace peft_ext
