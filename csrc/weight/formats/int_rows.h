// Integers in rows, as compressed-tensors stores them (pack-quantized, int-quantized, naive-quantized):
// W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g], where g is the group of column k. The difference code - zero is
// exact.
//
// part 0: codes; int32 [N, ceil(K bits / 32)] with code + 2^(bits - 1) in each field, or int8 [N, K] (flag kPlain);
// part 1: scales [N, G], or one scale (flag kOneScale);
// part 2: zeros, or null: int32 [ceil(N bits / 32), G], packed along N as the codes are along K; with kPlain int8, as
//         many as part 1 has scales;
// part 3: g_idx, int32 [K], the group of each column, or null: column k is of group k / group.
#pragma once

#include "weight/formats/int_codes.h"

namespace peft_ext {
namespace {

struct IntRows {
  static constexpr int kPlain = 1, kOneScale = 2;  // flags of `option`

  static bool is_plain(const PackedView& w) { return format_flags(w.option) & kPlain; }
  static bool has_one_scale(const PackedView& w) { return format_flags(w.option) & kOneScale; }

  static const char* refused(const PackedView& w) {
    const int bits = code_bits(w.option);
    const bool has_bits = is_plain(w) ? bits == 8 : bits == 2 || bits == 4 || bits == 8;
    const bool has_groups = w.group == 0 || w.columns % w.group == 0;
    return has_float_scales(w) && has_bits && has_groups && format_flags(w.option) < 4 &&
                   !(has_one_scale(w) && (w.group || (w.part[2] && !is_plain(w))))
               ? nullptr
               : "groups that divide the columns, 2, 4 or 8 bits, and scales of float32, bfloat16 or float16";
  }

  static int64_t part_bytes(const PackedView& w, int part) {
    const int bits = code_bits(w.option);
    const int64_t scales = has_one_scale(w) ? 1 : w.rows * groups_of(w);
    if (part == 0) return is_plain(w) ? w.rows * w.columns : 4 * w.rows * words_of(w.columns, bits);
    if (part == 1) return scale_bytes(w, scales);
    if (part == 2) return is_plain(w) ? -scales : -4 * words_of(w.rows, bits) * groups_of(w);
    return part == 3 ? -4 * w.columns : 0;
  }

  static int64_t scale_index(const PackedView& w, int64_t row, int64_t group) {
    return has_one_scale(w) ? 0 : row * groups_of(w) + group;
  }

  // Returns the zero point of a weight with the flag kPlain as it is stored, and of another weight as an unsigned code.
  static int zero_at(const PackedView& w, int64_t row, int64_t group) {
    const int bits = code_bits(w.option);
    if (!w.part[2]) return is_plain(w) ? 0 : 1 << (bits - 1);
    if (is_plain(w)) return static_cast<const int8_t*>(w.part[2])[scale_index(w, row, group)];
    const int codes = 32 / bits;
    const uint32_t* words = static_cast<const uint32_t*>(w.part[2]) + row / codes * groups_of(w) + group;
    return code_at(words, bits, row % codes);
  }

  static float value(const PackedView& w, int64_t row, int64_t column) {
    const int64_t group = group_at(w, w.part[3], column);
    const int bits = code_bits(w.option);
    const uint32_t* words = static_cast<const uint32_t*>(w.part[0]) + row * words_of(w.columns, bits);
    const int code =
        is_plain(w) ? static_cast<const int8_t*>(w.part[0])[row * w.columns + column] : code_at(words, bits, column);
    const float scale = scale_value(w.part[1], scale_type(w.option), scale_index(w, row, group));
    return static_cast<float>(code - zero_at(w, row, group)) * scale;
  }

#ifndef __CUDACC__
  static bool runs(const PackedView& w) { return w.columns % 32 == 0; }

  static void decode32(const PackedView& w, int64_t row, int64_t column, float* out) {
    const int64_t first = has_one_scale(w) ? 0 : row * (w.group ? divided(w.columns, w.group) : 1);
    if (one_group_in_32(w, w.part[3])) {
      const int64_t group = group_in_order(w, column);
      const int zero = w.part[2] ? zero_at(w, row, group) : is_plain(w) ? 0 : 1 << (code_bits(w.option) - 1);
      const float scale = scale_value(w.part[1], scale_type(w.option), first + group);
      scale_run(w, row, column, [=](int) { return zero; }, [=](int) { return scale; }, out);
      return;
    }
    int32_t groups[32];
    groups_of_32(w, w.part[3], column, groups);
    int zeros[32];
    for (int c = 0; c < 32; ++c) zeros[c] = is_plain(w) ? 0 : 1 << (code_bits(w.option) - 1);
    if (w.part[2])
      for (int c = 0; c < 32; ++c) zeros[c] = zero_at(w, row, groups[c]);
    float scales[32];
    with_scale_type(scale_type(w.option), [&](auto scale) {
      for (int c = 0; c < 32; ++c) scales[c] = scale_value(w.part[1], decltype(scale)::kType, first + groups[c]);
    });
    scale_run(w, row, column, [&](int c) { return zeros[c]; }, [&](int c) { return scales[c]; }, out);
  }

  static constexpr Nibbles kNibbles = Nibbles::kLowFirst;
  static constexpr int kScaleColumns = 32;
  static bool has_nibbles(const PackedView& w) {
    return code_bits(w.option) == 4 && !is_plain(w) && one_group_in_32(w, w.part[3]);
  }
  static const uint8_t* codes32(const PackedView& w, int64_t row, int64_t column) {
    return static_cast<const uint8_t*>(w.part[0]) + (row * w.columns + column) / 2;
  }
  static void entries(const PackedView& w, int64_t row, int64_t column, float* out) {
    const int64_t group = group_in_order(w, column);
    const int zero = zero_at(w, row, group);
    const float scale = scale_value(w.part[1], scale_type(w.option), scale_index(w, row, group));
    for (int i = 0; i < 16; ++i) out[i] = static_cast<float>(i - zero) * scale;
  }

 private:
  // Writes (code - zero(c)) * scale(c) for 32 columns.
  template <typename Zero, typename Scale>
  static void scale_run(const PackedView& w, int64_t row, int64_t column, const Zero& zero, const Scale& scale,
                        float* out) {
    const int64_t flat = row * w.columns + column;
    const int bits = code_bits(w.option);
    if (!is_plain(w))
      return scale_codes(static_cast<const uint8_t*>(w.part[0]) + flat / 8 * bits, bits, zero, scale, out);
    const int8_t* codes = static_cast<const int8_t*>(w.part[0]) + flat;
    for (int c = 0; c < 32; ++c) out[c] = static_cast<float>(codes[c] - zero(c)) * scale(c);
  }
#endif
};

}  // namespace
}  // namespace peft_ext
