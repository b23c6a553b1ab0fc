// Functions for codes of 4 bits, most of them without tables in memory and without branches, because GCC vectorizes
// shifts and masks. GCC vectorizes a loop of constant length inside of another loop only if `#pragma GCC unroll 1`
// keeps GCC from unrolling the loop first.
#pragma once

#include "weight/packed_view.h"

namespace peft_ext {
namespace {

// Returns a product that the compiler does not contract with a sum to an FMA.
inline float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// Returns entry `index` (0 to 7) of a table of eight nibbles; entry 0 is the lowest nibble.
inline uint32_t nibble_entry(uint32_t table, uint32_t index) { return table >> (4 * index) & 15; }

// Returns twice the value of an e2m1 code. Twice the value is an integer: 0, 1, 2, 3, 4, 6, 8 or 12 for the codes 0 to
// 7, and the negatives of these integers from code 8 on. The e2m1 code 8 is -0.
inline float e2m1_doubled(uint32_t code) {
  const float magnitude = static_cast<float>(static_cast<int32_t>(nibble_entry(0xc8643210u, code & 7)));
  return bits_to_float(float_to_bits(magnitude) | (code & 8) << 28);
}

#ifndef __CUDACC__
// The values that e2m1_doubled returns for the 16 codes.
constexpr float kE2m1Doubled[16] = {0.0f,  1.0f,  2.0f,  3.0f,  4.0f,  6.0f,  8.0f,  12.0f,
                                    -0.0f, -1.0f, -2.0f, -3.0f, -4.0f, -6.0f, -8.0f, -12.0f};
#endif

// Returns code `element` of an array of nibbles. `first` is 0 if the low nibble of a byte is the even element, else 1.
inline uint32_t nibble_code(const void* bytes, int64_t element, int first) {
  return static_cast<const uint8_t*>(bytes)[element / 2] >> (4 * ((element & 1) ^ first)) & 15;
}

#ifndef __CUDACC__
// Writes the 32 codes of 16 bytes. A shift of a 64-bit word gives each code without a permutation of vectors.
inline void nibble_codes(const void* bytes, int first, uint32_t* codes) {
  uint64_t words[2];
  memcpy(words, bytes, sizeof(words));
#pragma GCC unroll 1
  for (int i = 0; i < 16; ++i) codes[i] = words[0] >> (4 * (i ^ first)) & 15;
#pragma GCC unroll 1
  for (int i = 0; i < 16; ++i) codes[16 + i] = words[1] >> (4 * (i ^ first)) & 15;
}
#endif

}  // namespace
}  // namespace peft_ext
