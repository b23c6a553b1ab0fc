// Integers in rows, as compressed-tensors stores them (pack-quantized, int-quantized, naive-quantized):
// W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g], where g is the group of column k. The difference is exact.
//
// part 0: codes; int32 [N, ceil(K bits / 32)] with code + 2^(bits - 1) in each field, or int8 [N, K] (flag kPlain);
// part 1: scales [N, G], or one scale (flag kOneScale);
// part 2: zeros, or null: int32 [ceil(N bits / 32), G], packed along N as the codes are along K; with kPlain int8 [N, G];
// part 3: g_idx, int32 [K], the group of each column, or null: column k is of group k / group.
#pragma once

#include "weight/formats/int_codes.h"

namespace peft_ext {
namespace {

struct IntRows {
  static constexpr int kPlain = 1, kOneScale = 2;  // flags of `option`

  PEFT_EXT_BOTH static int64_t scale_index(const PackedView& w, int64_t row, int64_t group) {
    return format_flags(w.option) & kOneScale ? 0 : row * groups_of(w) + group;
  }

  // Returns the zero of a packed weight as a code of 0 and more, and the zero of a plain weight as it is stored.
  PEFT_EXT_BOTH static int zero_at(const PackedView& w, int64_t row, int64_t group) {
    const bool plain = format_flags(w.option) & kPlain;
    const int bits = code_bits(w.option);
    if (!w.part[2]) return plain ? 0 : 1 << (bits - 1);
    if (plain) return static_cast<const int8_t*>(w.part[2])[scale_index(w, row, group)];
    const int64_t word = row * bits / 32 * groups_of(w) + group;
    return code_at(static_cast<const uint32_t*>(w.part[2]) + word, bits, row % (32 / bits));
  }

  PEFT_EXT_BOTH static float value(const PackedView& w, int64_t row, int64_t column) {
    const int64_t group = group_at(w, w.part[3], column);
    const int bits = code_bits(w.option);
    const int code = format_flags(w.option) & kPlain
                         ? static_cast<const int8_t*>(w.part[0])[row * w.columns + column]
                         : code_at(static_cast<const uint32_t*>(w.part[0]) + row * words_of(w.columns, bits), bits, column);
    const float scale = scale_value(w.part[1], scale_type(w.option), scale_index(w, row, group));
    return static_cast<float>(code - zero_at(w, row, group)) * scale;
  }

  static bool runs(const PackedView& w) { return w.columns % 32 == 0; }

  static void decode32(const PackedView& w, int64_t row, int64_t column, float* out) {
    const ScaleType type = scale_type(w.option);
    const int bits = code_bits(w.option);
    const bool plain = format_flags(w.option) & kPlain;
    const int8_t* bytes = static_cast<const int8_t*>(w.part[0]) + row * w.columns + column;
    const uint32_t* words = static_cast<const uint32_t*>(w.part[0]) + (row * w.columns + column) * bits / 32;
    if (one_group_in_32(w, w.part[3])) {
      const int64_t group = group_at(w, nullptr, column);
      const int zero = zero_at(w, row, group);
      const float scale = scale_value(w.part[1], type, scale_index(w, row, group));
      if (!plain) return scale_codes(words, bits, zero, scale, out);
      for (int c = 0; c < 32; ++c) out[c] = static_cast<float>(bytes[c] - zero) * scale;
      return;
    }
    int zeros[32];
    float scales[32];
    for (int c = 0; c < 32; ++c) {
      const int64_t group = group_at(w, w.part[3], column + c);
      zeros[c] = zero_at(w, row, group);
      scales[c] = scale_value(w.part[1], type, scale_index(w, row, group));
    }
    if (!plain) return scale_codes<const int*, const float*>(words, bits, zeros, scales, out);
    for (int c = 0; c < 32; ++c) out[c] = static_cast<float>(bytes[c] - zeros[c]) * scales[c];
  }
};

}  // namespace
}  // namespace peft_ext
