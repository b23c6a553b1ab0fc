// bitsandbytes' FP4: W[n, k] = code value * absmax of the block, over the flat weight, in NF4's layout.
//
// part 0: codes, uint8 [ceil(N K / 2)], two per byte, the high nibble is the even element of the flat weight;
// part 1: absmax [ceil(N K / group)], float32; with double quantization uint8, decoded by parts 2 to 4:
//         absmax_i = code[absmax_u8[i]] * nested_absmax[i / 256] + offset, each step rounded to float32.
// The block size `group` is a power of two of at least 32, and the flags are the block size's log2. A block may hold
// elements of several rows.
// Source: bitsandbytes' get_4bit_type("fp4") and dequantize_4bit.
#pragma once

#include "weight/formats/codes.h"

namespace peft_ext {
namespace {

#ifndef __CUDACC__
// The values that Fp4::code_value returns for the 16 codes.
constexpr float kFp4Code[16] = {0.0f, 0.0625f / 12,  8.0f / 12,  1.0f,  4.0f / 12,  0.5f,  2.0f / 12,  0.25f,
                                0.0f, -0.0625f / 12, -8.0f / 12, -1.0f, -4.0f / 12, -0.5f, -2.0f / 12, -0.25f};
// Three times the values of kFp4Code. bfloat16 holds each of these products exactly.
constexpr float kFp4Triple[16] = {0.0f, 1.0f / 64,  2.0f,  3.0f,  1.0f,  1.5f,  0.5f,  0.75f,
                                  0.0f, -1.0f / 64, -2.0f, -3.0f, -1.0f, -1.5f, -0.5f, -0.75f};
#endif

struct Fp4 {
  static const char* refused(const PackedView& w) {
    const int shift = format_flags(w.option);
    return shift >= 5 && shift < 32 && w.group == int64_t{1} << shift
               ? nullptr
               : "a group that is a power of two of 32 or more, and the group's log2 as flags";
  }
  static int64_t part_bytes(const PackedView& w, int part) {
    const int64_t elements = w.rows * w.columns, blocks = (elements + w.group - 1) >> format_flags(w.option);
    const bool nested = w.part[2] != nullptr;
    switch (part) {
      case 0:
        return (elements + 1) / 2;
      case 1:
        return nested ? blocks : 4 * blocks;
      case 2:
        return nested ? 4 * ((blocks + 255) / 256) : 0;
      case 3:
        return nested ? 4 * 256 : 0;
      default:
        return nested ? 4 : 0;
    }
  }

  // Returns the value of a code: 2/3 * 2^-x for codes 1, 2, 4 and 6, 2^-x for codes 3, 5 and 7, +0 for codes 0 and 8,
  // and for a code from 9 on the negative of the value of code - 8. An entry of the table in code_value holds x in the
  // low three bits; the fourth bit is set if the code's value is a power of two.
  static float code_value(uint32_t code) {
    const uint32_t entry = nibble_entry(0xa2918070u, code & 7);
    const uint32_t two_thirds = 0x3f2aaaabu, to_one = 0x3f800000u - two_thirds;
    const uint32_t bits = two_thirds + ((0u - (entry >> 3)) & to_one) - ((entry & 7) << 23);
    const uint32_t nonzero = 0u - ((0u - (code & 7)) >> 31);
    return bits_to_float((bits | (code & 8) << 28) & nonzero);
  }

  static float scale(const PackedView& w, int64_t block) {
    if (w.part[2] == nullptr) return static_cast<const float*>(w.part[1])[block];
    const uint8_t code = static_cast<const uint8_t*>(w.part[1])[block];
    const float nested = static_cast<const float*>(w.part[2])[block / 256];
    const float product = rounded_product(static_cast<const float*>(w.part[3])[code], nested);
    return product + static_cast<const float*>(w.part[4])[0];
  }

  static float value(const PackedView& w, int64_t row, int64_t column) {
    const int64_t flat = row * w.columns + column;
    return code_value(nibble_code(w.part[0], flat, 1)) * scale(w, flat >> format_flags(w.option));
  }

#ifndef __CUDACC__
  static bool runs(const PackedView& w) { return w.columns % 32 == 0; }
  static void decode32(const PackedView& w, int64_t row, int64_t column, float* out) {
    const int64_t flat = row * w.columns + column;
    const float factor = scale(w, flat >> format_flags(w.option));
    uint32_t codes[32];
    nibble_codes(static_cast<const uint8_t*>(w.part[0]) + flat / 2, 1, codes);
#pragma GCC unroll 1
    for (int i = 0; i < 32; ++i) out[i] = code_value(codes[i]) * factor;
  }

  static constexpr Nibbles kNibbles = Nibbles::kHighFirst;
  static constexpr bool kContiguous = true;
  static constexpr int kScaleColumns = 32;
  static bool has_nibbles(const PackedView&) { return true; }
  static const float* table16() { return kFp4Triple; }
  static const uint8_t* codes32(const PackedView& w, int64_t row, int64_t column) {
    return static_cast<const uint8_t*>(w.part[0]) + (row * w.columns + column) / 2;
  }
  static void entries(const PackedView& w, int64_t row, int64_t column, float* out) {
    const float factor = scale(w, (row * w.columns + column) >> format_flags(w.option));
    for (int i = 0; i < 16; ++i) out[i] = kFp4Code[i] * factor;
  }
  // Writes the scales divided by three, because table16 returns kFp4Triple.
  static void scales(const PackedView& w, int64_t row, int64_t column, int64_t count, float* factors) {
    const int shift = format_flags(w.option);
    const int64_t first = row * w.columns + column;
    if (shift == 6 && first % 64 == 0 && w.part[2] == nullptr) {  // a loop that compilers vectorize
      const float* absmax = static_cast<const float*>(w.part[1]) + first / 64;
      for (int64_t i = 0; i < count / 2; ++i) factors[2 * i] = factors[2 * i + 1] = absmax[i] / 3.0f;
      if (count % 2) factors[count - 1] = absmax[count / 2] / 3.0f;
      return;
    }
    for (int64_t i = 0; i < count;) {
      const int64_t block = (first + 32 * i) >> shift;
      const int64_t stop = min_i64(count, (((block + 1) << shift) - first + 31) / 32);
      for (const float factor = scale(w, block) / 3.0f; i < stop; ++i) factors[i] = factor;
    }
  }
#endif
};

}  // namespace
}  // namespace peft_ext
