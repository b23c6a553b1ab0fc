// HQQ, 4 or 8 bits: W[n, k] = round(code - zero[g]) * scale[g], where round() rounds to the dtype of scale and zero, in
// which the hqq library computes. The zero point zero[g] need not be an integer.
//
// part 0: W_q, uint8. Codes are numbered f = n K + k. With 8 bits, code f is byte f. With 4 bits, the first half of the
// codes is in the high nibbles of the N K / 2 bytes, and the second half is in the low nibbles. part 1: scale, part 2:
// zero, G = N K / group of each. The group g of code f is f / group, or f % G with the flag kAxis0.
#pragma once

#include "weight/formats/int_codes.h"

namespace peft_ext {
namespace {

struct Hqq {
  static constexpr bool kRowMajor = false;

  static constexpr int kAxis0 = 1;  // flag of `option`

  static bool has_axis0(const PackedView& w) { return format_flags(w.option) & kAxis0; }

  static const char* refused(const PackedView& w) {
    const int bits = code_bits(w.option);
    const int64_t count = w.rows * w.columns;
    return has_float_scales(w) && (bits == 4 || bits == 8) && format_flags(w.option) < 2 && w.group > 0 &&
                   count % w.group == 0 && (bits == 8 || (has_axis0(w) ? w.group : count / w.group) % 2 == 0)
               ? nullptr
               : "groups that divide the elements, an even number of them with 4 bits, 4 or 8 bits, and scales of "
                 "float32, bfloat16 or float16";
  }

  static int64_t part_bytes(const PackedView& w, int part) {
    const int64_t count = w.rows * w.columns;
    if (part == 0) return code_bits(w.option) == 8 ? count : count / 2;
    return part < 3 ? scale_bytes(w, count / w.group) : 0;
  }

  // Returns a float32 value, rounded to nearest, ties to even, to a dtype of scales. No branch depends on the value,
  // and the comparisons are of signed numbers, so that loops that call this function are vectorized.
  static float rounded(float value, ScaleType type) {
    if (type == ScaleType::kF32) return value;
    int32_t bits, wide;
    memcpy(&bits, &value, sizeof(bits));
    const int32_t magnitude = bits & 0x7fffffff, sign = bits ^ magnitude;
    if (type == ScaleType::kBF16) {
      const int32_t number = magnitude < 0x7f800000 ? magnitude : 0x7f800000;
      const int32_t even = (number + 0x7fff + (number >> 16 & 1)) & ~0xffff;
      wide = magnitude > 0x7f800000 ? magnitude : even;
    } else {
      // Adding and subtracting 2^13 times the number's power of two leaves the 11 bits of a float16 number, and the
      // multiples of 2^-24 below 2^-14. A rounded magnitude of 65536 or more becomes infinity.
      const int32_t number = magnitude < 0x47800000 ? magnitude : 0x47800000;
      const int32_t power = ((number > 0x38800000 ? number : 0x38800000) & 0x7f800000) + (13 << 23);
      float sum, large;
      memcpy(&sum, &number, sizeof(sum));
      memcpy(&large, &power, sizeof(large));
      sum = (sum + large) - large;
      memcpy(&wide, &sum, sizeof(wide));
      wide = (wide < 0x47800000 ? wide : 0x7f800000) | (magnitude > 0x7f800000 ? magnitude : 0);
    }
    wide |= sign;
    memcpy(&value, &wide, sizeof(value));
    return value;
  }

  static float value(const PackedView& w, int64_t row, int64_t column) {
    const uint8_t* codes = static_cast<const uint8_t*>(w.part[0]);
    const int64_t flat = row * w.columns + column, count = w.rows * w.columns, half = count / 2;
    const int64_t group = has_axis0(w) ? flat % (count / w.group) : flat / w.group;
    const int code = code_bits(w.option) == 8 ? codes[flat] : flat < half ? codes[flat] >> 4 : codes[flat - half] & 15;
    const ScaleType type = scale_type(w.option);
    const float difference = static_cast<float>(code) - scale_value(w.part[2], type, group);
    return rounded(difference, type) * scale_value(w.part[1], type, group);
  }

#ifndef __CUDACC__
  static bool runs(const PackedView& w) {
    const int64_t count = w.rows * w.columns, run = has_axis0(w) ? count / w.group : w.group;
    return w.columns % 32 == 0 && count % 64 == 0 && run % 32 == 0;
  }

  static void decode32(const PackedView& w, int64_t row, int64_t column, float* out) {
    with_scale_type(scale_type(w.option), [&](auto scale) { decode_as<decltype(scale)::kType>(w, row, column, out); });
  }

 private:
  template <ScaleType kType>
  static void decode_as(const PackedView& w, int64_t row, int64_t column, float* out) {
    const int64_t flat = row * w.columns + column, count = w.rows * w.columns, half = count / 2;
    const bool bytes = code_bits(w.option) == 8;
    const int shift = !bytes && flat < half ? 4 : 0, mask = bytes ? 255 : 15;
    const uint8_t* from = static_cast<const uint8_t*>(w.part[0]) + (bytes || flat < half ? flat : flat - half);
    if (has_axis0(w)) {
      const int64_t group = flat % divided(count, w.group);
      float zeros[32], scales[32];
      for (int c = 0; c < 32; ++c) {
        zeros[c] = scale_value(w.part[2], kType, group + c);
        scales[c] = scale_value(w.part[1], kType, group + c);
      }
      for (int c = 0; c < 32; ++c)
        out[c] = rounded(static_cast<float>(from[c] >> shift & mask) - zeros[c], kType) * scales[c];
      return;
    }
    const int64_t group = divided(flat, w.group);
    const float zero = scale_value(w.part[2], kType, group), scale = scale_value(w.part[1], kType, group);
    for (int c = 0; c < 32; ++c) out[c] = rounded(static_cast<float>(from[c] >> shift & mask) - zero, kType) * scale;
  }
#endif
};

}  // namespace
}  // namespace peft_ext
