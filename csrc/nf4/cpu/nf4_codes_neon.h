// Defines types for NF4 codes and for lookup tables in NEON registers.
#pragma once

#include <arm_neon.h>

#include "common/dtype.h"

namespace peft_ext {
namespace {

// The 4-bit codes of 32 elements, one byte for each code: `even` has the codes of the even elements, `odd` the codes of
// the odd elements. The code of a byte's even element is the high nibble.
struct Nibbles {
  uint8x16_t even, odd;
};

inline Nibbles nibbles(const uint8_t* packed) {
  const uint8x16_t bytes = vld1q_u8(packed);
  return {vshrq_n_u8(bytes, 4), vandq_u8(bytes, vdupq_n_u8(15))};
}

// A table of 16 values as one register for each byte of a value, from the lowest byte to the highest.
using WordPlanes = uint8x16x2_t;
using FloatPlanes = uint8x16x4_t;

inline WordPlanes planes_of(const bf16* values) { return vld2q_u8(reinterpret_cast<const uint8_t*>(values)); }
inline WordPlanes planes_of(const f16* values) { return vld2q_u8(reinterpret_cast<const uint8_t*>(values)); }
inline FloatPlanes planes_of(const float* values) { return vld4q_u8(reinterpret_cast<const uint8_t*>(values)); }

}  // namespace
}  // namespace peft_ext
