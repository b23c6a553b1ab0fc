// HQQ, 4 or 8 bits: W[n, k] = round(code - zero[g]) * scale[g], where round() rounds to the dtype of scale and zero, in
// which the hqq library computes. zero is not an integer.
//
// part 0: W_q, uint8. Codes are numbered f = n K + k. 8 bits: byte f. 4 bits: the first half of the codes is in the high
// nibbles of the N K / 2 bytes, and the second half is in the low nibbles.
// part 1: scale, part 2: zero, G = N K / group of each. g is f / group, or f % G with the flag kAxis0.
#pragma once

#include "weight/packed_view.h"

namespace peft_ext {
namespace {

struct Hqq {
  static constexpr int kAxis0 = 1;  // flag of `option`

  // Returns a float32 value, rounded to nearest, ties to even, to a dtype of scales. No branch depends on the value, so
  // that loops of this function are vectorized.
  PEFT_EXT_BOTH static float rounded(float value, ScaleType type) {
    if (type == ScaleType::kF32) return value;
    uint32_t bits, wide;
    memcpy(&bits, &value, sizeof(bits));
    const uint32_t sign = bits & 0x80000000u, magnitude = bits ^ sign;
    if (type == ScaleType::kBF16) {
      const uint32_t even = magnitude + 0x7fffu + (magnitude >> 16 & 1);
      wide = magnitude > 0x7f800000u ? magnitude : even & 0xffff0000u;
    } else {
      float small;
      memcpy(&small, &magnitude, sizeof(small));
      small = (small + 0.5f) - 0.5f;  // a multiple of 2^-24, the distance of subnormal float16 numbers
      uint32_t low;
      memcpy(&low, &small, sizeof(low));
      uint32_t even = (magnitude + 0xfffu + (magnitude >> 13 & 1)) & 0xffffe000u;
      even = even >= 0x47800000u ? 0x7f800000u : even;  // 65536 and more are infinite
      wide = magnitude > 0x7f800000u ? magnitude : magnitude < 0x38800000u ? low : even;
    }
    wide |= sign;
    memcpy(&value, &wide, sizeof(value));
    return value;
  }

  PEFT_EXT_BOTH static int64_t group_count(const PackedView& w) { return w.rows * w.columns / w.group; }

  PEFT_EXT_BOTH static float value(const PackedView& w, int64_t row, int64_t column) {
    const uint8_t* codes = static_cast<const uint8_t*>(w.part[0]);
    const int64_t flat = row * w.columns + column, half = w.rows * w.columns / 2;
    const int64_t group = format_flags(w.option) & kAxis0 ? flat % group_count(w) : flat / w.group;
    const int code = code_bits(w.option) == 8 ? codes[flat] : flat < half ? codes[flat] >> 4 : codes[flat - half] & 15;
    const ScaleType type = scale_type(w.option);
    const float difference = static_cast<float>(code) - scale_value(w.part[2], type, group);
    return rounded(difference, type) * scale_value(w.part[1], type, group);
  }

  static bool runs(const PackedView& w) {
    const int64_t run = format_flags(w.option) & kAxis0 ? group_count(w) : w.group;
    return w.columns % 32 == 0 && w.rows * w.columns % 64 == 0 && run % 32 == 0;
  }

  template <ScaleType kType>
  static void decode_as(const PackedView& w, int64_t row, int64_t column, float* out) {
    const uint8_t* codes = static_cast<const uint8_t*>(w.part[0]);
    const int64_t flat = row * w.columns + column, half = w.rows * w.columns / 2;
    const bool bytes = code_bits(w.option) == 8;
    const int shift = !bytes && flat < half ? 4 : 0, mask = bytes ? 255 : 15;
    codes += bytes || flat < half ? flat : flat - half;
    if (format_flags(w.option) & kAxis0) {
      const int64_t group = flat % group_count(w);
      float zeros[32], scales[32];
      for (int c = 0; c < 32; ++c) {
        zeros[c] = scale_value(w.part[2], kType, group + c);
        scales[c] = scale_value(w.part[1], kType, group + c);
      }
      for (int c = 0; c < 32; ++c)
        out[c] = rounded(static_cast<float>(codes[c] >> shift & mask) - zeros[c], kType) * scales[c];
      return;
    }
    const float zero = scale_value(w.part[2], kType, flat / w.group);
    const float scale = scale_value(w.part[1], kType, flat / w.group);
    for (int c = 0; c < 32; ++c)
      out[c] = rounded(static_cast<float>(codes[c] >> shift & mask) - zero, kType) * scale;
  }

  static void decode32(const PackedView& w, int64_t row, int64_t column, float* out) {
    const ScaleType type = scale_type(w.option);
    if (type == ScaleType::kF32) return decode_as<ScaleType::kF32>(w, row, column, out);
    if (type == ScaleType::kBF16) return decode_as<ScaleType::kBF16>(w, row, column, out);
    decode_as<ScaleType::kF16>(w, row, column, out);
  }
};

}  // namespace
}  // namespace peft_ext
