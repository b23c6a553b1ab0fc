// GPTQ, as GPTQModel and AutoGPTQ store it: W[n, k] = scale[g, n] * (code[k, n] - zero[g, n]), where g is the group of
// column k. The weight is stored transposed, and a word holds consecutive columns k of one row n. The difference code -
// zero is exact.
//
// part 0: qweight, int32 [ceil(K bits / 32), N]; part 1: scales [G, N];
// part 2: qzeros, int32 [G, ceil(N bits / 32)], packed along N;
// part 3: g_idx, int32 [K], the group of each column, or null: column k is of group k / group.
// Files of the first version (flag kV1) store zero - 1 in each field of a word of qzeros. GPTQModel adds the ones to
// the whole word, so that a field of all ones carries into the next field.
#pragma once

#include "weight/formats/int_codes.h"

namespace peft_ext {
namespace {

struct Gptq {
  static constexpr int kV1 = 1;  // flag of `option`
  static constexpr bool kRowBlocks = true;

  static const char* refused(const PackedView& w) {
    const int bits = code_bits(w.option);
    return has_float_scales(w) && (bits == 2 || bits == 4 || bits == 8) && format_flags(w.option) < 2
               ? nullptr
               : "2, 4 or 8 bits, and scales of float32, bfloat16 or float16";
  }

  static int64_t part_bytes(const PackedView& w, int part) {
    const int bits = code_bits(w.option);
    if (part == 0) return 4 * words_of(w.columns, bits) * w.rows;
    if (part == 1) return scale_bytes(w, groups_of(w) * w.rows);
    if (part == 2) return 4 * groups_of(w) * words_of(w.rows, bits);
    return part == 3 ? -4 * w.columns : 0;
  }

  static int zero_at(const PackedView& w, int64_t row, int64_t group) {
    const int bits = code_bits(w.option);
    const uint32_t ones = 0xffffffffu / ((1u << bits) - 1);  // a word with a 1 in each field of `bits` bits
    const uint32_t word = static_cast<const uint32_t*>(w.part[2])[group * words_of(w.rows, bits) + (row * bits >> 5)] +
                          (format_flags(w.option) & kV1 ? ones : 0u);
    return field_of(word, bits, row);
  }

  static float value(const PackedView& w, int64_t row, int64_t column) {
    const int bits = code_bits(w.option);
    const int64_t group = group_at(w, w.part[3], column);
    const uint32_t word = static_cast<const uint32_t*>(w.part[0])[(column * bits >> 5) * w.rows + row];
    const float scale = scale_value(w.part[1], scale_type(w.option), group * w.rows + row);
    return scale * static_cast<float>(field_of(word, bits, column) - zero_at(w, row, group));
  }

#ifndef __CUDACC__
  static bool runs(const PackedView& w) { return w.columns % 32 == 0; }

  static void decode32(const PackedView& w, int64_t row, int64_t column, float* out) {
    decode_rows(w, row, 1, column, out, 32);
  }

  // Writes W[row + r, column + c] to out[r * stride + c] for r below `rows` (16 at most) and c below 32. If
  // one_group_in_32 returns true, the function reads each word once: a cache line has the words of 16 rows.
  static void decode_rows(const PackedView& w, int64_t row, int64_t rows, int64_t column, float* out, int64_t stride) {
    with_scale_type(scale_type(w.option), [&](auto scale) {
      switch (code_bits(w.option)) {
        case 4:
          return decode_as<decltype(scale)::kType, 4>(w, row, rows, column, out, stride);
        case 8:
          return decode_as<decltype(scale)::kType, 8>(w, row, rows, column, out, stride);
        default:
          return decode_as<decltype(scale)::kType, 2>(w, row, rows, column, out, stride);
      }
    });
  }

 private:
  // Writes the zero points and the scales that `rows` rows have in one group of columns.
  template <ScaleType kType, int kBits>
  static void read_group(const PackedView& w, int64_t row, int64_t rows, int64_t group, int* zeros, float* scales) {
    constexpr int kCodes = 32 / kBits;
    const uint32_t ones = format_flags(w.option) & kV1 ? 0xffffffffu / ((1u << kBits) - 1) : 0u;
    const uint32_t* words = static_cast<const uint32_t*>(w.part[2]) + group * words_of(w.rows, kBits);
    if (row % 16 == 0 && rows == 16) {
      for (int i = 0; i < 16 / kCodes; ++i)
        for (int j = 0; j < kCodes; ++j) zeros[i * kCodes + j] = field_of(words[row / kCodes + i] + ones, kBits, j);
      for (int r = 0; r < 16; ++r) scales[r] = scale_value(w.part[1], kType, group * w.rows + row + r);
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      zeros[r] = field_of(words[(row + r) / kCodes] + ones, kBits, row + r);
      scales[r] = scale_value(w.part[1], kType, group * w.rows + row + r);
    }
  }

  template <ScaleType kType, int kBits>
  static void decode_as(const PackedView& w, int64_t row, int64_t rows, int64_t column, float* out, int64_t stride) {
    constexpr int kCodes = 32 / kBits;
    const uint32_t* from = static_cast<const uint32_t*>(w.part[0]) + column / kCodes * w.rows + row;
    int zeros[16];
    float scales[16];
    if (one_group_in_32(w, w.part[3])) {
      uint32_t words[16][kBits];
      for (int i = 0; i < kBits; ++i)
        for (int64_t r = 0; r < rows; ++r) words[r][i] = from[i * w.rows + r];
      read_group<kType, kBits>(w, row, rows, group_at(w, nullptr, column), zeros, scales);
      for (int64_t r = 0; r < rows; ++r)
        scale_local_codes<kBits>(reinterpret_cast<const uint8_t*>(words[r]), zeros[r], scales[r], out + r * stride);
      return;
    }
    int32_t groups[32];
    groups_of_32(w, w.part[3], column, groups);
    float block[32][16];
    for (int c = 0; c < 32; ++c) {
      read_group<kType, kBits>(w, row, rows, groups[c], zeros, scales);
      const uint32_t* words = from + c / kCodes * w.rows;
      for (int64_t r = 0; r < rows; ++r)
        block[c][r] = scales[r] * static_cast<float>(field_of(words[r], kBits, c) - zeros[r]);
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int c = 0; c < 32; ++c) out[r * stride + c] = block[c][r];
  }
#endif
};

}  // namespace
}  // namespace peft_ext
