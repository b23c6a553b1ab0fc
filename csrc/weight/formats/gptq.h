// GPTQ, as GPTQModel and AutoGPTQ store it: W[n, k] = scale[g, n] * (code[k, n] - zero[g, n]), where g is the group of
// column k. The weight is stored transposed, and a word holds consecutive columns k of one row n. The difference is exact.
//
// part 0: qweight, int32 [ceil(K bits / 32), N]; part 1: scales [G, N];
// part 2: qzeros, int32 [G, ceil(N bits / 32)], packed along N;
// part 3: g_idx, int32 [K], the group of each column, or null: column k is of group k / group.
// Files of the first version (flag kV1) store words of zeros from which 1 was subtracted in each field. GPTQModel adds
// the ones to the whole word, so that a field of all ones carries into the next field.
#pragma once

#include "weight/formats/int_codes.h"

namespace peft_ext {
namespace {

struct Gptq {
  static constexpr int kV1 = 1;  // flag of `option`
  static constexpr bool kRowBlocks = true;

  PEFT_EXT_BOTH static int zero_at(const PackedView& w, int64_t row, int64_t group) {
    const int bits = code_bits(w.option);
    const int64_t word = group * words_of(w.rows, bits) + row * bits / 32;
    const uint32_t ones = 0xffffffffu / ((1u << bits) - 1);  // 1 in each field
    const uint32_t zeros = static_cast<const uint32_t*>(w.part[2])[word] + (format_flags(w.option) & kV1 ? ones : 0u);
    return static_cast<int>(zeros >> (row * bits % 32) & ((1u << bits) - 1));
  }

  PEFT_EXT_BOTH static float scale_at(const PackedView& w, int64_t row, int64_t group) {
    return scale_value(w.part[1], scale_type(w.option), group * w.rows + row);
  }

  PEFT_EXT_BOTH static float value(const PackedView& w, int64_t row, int64_t column) {
    const int bits = code_bits(w.option);
    const int64_t group = group_at(w, w.part[3], column);
    const uint32_t word = static_cast<const uint32_t*>(w.part[0])[column * bits / 32 * w.rows + row];
    const int code = static_cast<int>(word >> (column * bits % 32) & ((1u << bits) - 1));
    return scale_at(w, row, group) * static_cast<float>(code - zero_at(w, row, group));
  }

  static bool runs(const PackedView& w) { return w.columns % 32 == 0; }

  static void decode32(const PackedView& w, int64_t row, int64_t column, float* out) {
    decode_rows(w, row, 1, column, out, 32);
  }

  // Writes W[row + r, column + c] to out[r * stride + c] for r below `rows` (16 at most) and c below 32. Reads each word
  // once: a line of 16 words is of 16 rows.
  static void decode_rows(const PackedView& w, int64_t row, int64_t rows, int64_t column, float* out, int64_t stride) {
    const int bits = code_bits(w.option);
    const uint32_t* from = static_cast<const uint32_t*>(w.part[0]) + column * bits / 32 * w.rows + row;
    uint32_t words[16][8];
    for (int i = 0; i < bits; ++i)
      for (int64_t r = 0; r < rows; ++r) words[r][i] = from[i * w.rows + r];
    if (one_group_in_32(w, w.part[3])) {
      const int64_t group = group_at(w, nullptr, column);
      for (int64_t r = 0; r < rows; ++r)
        scale_codes(words[r], bits, zero_at(w, row + r, group), scale_at(w, row + r, group), out + r * stride);
      return;
    }
    int zeros[16][32];
    float scales[16][32];
    for (int c = 0; c < 32; ++c) {
      const int64_t group = group_at(w, w.part[3], column + c);
      for (int64_t r = 0; r < rows; ++r) {
        zeros[r][c] = zero_at(w, row + r, group);
        scales[r][c] = scale_at(w, row + r, group);
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      scale_codes<const int*, const float*>(words[r], bits, zeros[r], scales[r], out + r * stride);
  }
};

}  // namespace
}  // namespace peft_ext
