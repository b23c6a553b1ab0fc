// AWQ (GEMM layout), 4 bits: W[n, k] = (code[k, n] - zero[g, n]) * scale[g, n], where g is k / group. The weight is stored
// transposed, and a word holds eight rows n of one column k, in the order 0 2 4 6 1 3 5 7. The difference is exact.
//
// part 0: qweight, int32 [K, N / 8]; part 1: scales [G, N]; part 2: qzeros, int32 [G, N / 8].
#pragma once

#include "weight/formats/int_codes.h"

namespace peft_ext {
namespace {

struct Awq {
  static constexpr bool kRowBlocks = true;

  // Returns the code of a row in its word.
  PEFT_EXT_BOTH static int code_of(uint32_t word, int64_t row) {
    return static_cast<int>(word >> (row % 2 * 16 + row % 8 / 2 * 4) & 15);
  }

  PEFT_EXT_BOTH static float value(const PackedView& w, int64_t row, int64_t column) {
    const int64_t group = group_at(w, nullptr, column), words = w.rows / 8;
    const int code = code_of(static_cast<const uint32_t*>(w.part[0])[column * words + row / 8], row);
    const int zero = code_of(static_cast<const uint32_t*>(w.part[2])[group * words + row / 8], row);
    return static_cast<float>(code - zero) * scale_value(w.part[1], scale_type(w.option), group * w.rows + row);
  }

  static bool runs(const PackedView& w) { return w.columns % 32 == 0 && w.group % 32 == 0; }

  static void decode32(const PackedView& w, int64_t row, int64_t column, float* out) {
    decode_rows(w, row, 1, column, out, 32);
  }

  // Writes W[row + r, column + c] to out[r * stride + c] for r below `rows` (16 at most) and c below 32. Reads each word
  // once, for the eight rows of the word.
  static void decode_rows(const PackedView& w, int64_t row, int64_t rows, int64_t column, float* out, int64_t stride) {
    const int64_t group = group_at(w, nullptr, column), words = w.rows / 8;
    const uint32_t* from = static_cast<const uint32_t*>(w.part[0]) + column * words;
    const uint32_t* zeros = static_cast<const uint32_t*>(w.part[2]) + group * words;
    const ScaleType type = scale_type(w.option);
    uint32_t of[32];
    int64_t held = -1;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = row + r;
      if (n / 8 != held) {
        held = n / 8;
        for (int c = 0; c < 32; ++c) of[c] = from[c * words + held];
      }
      const int shift = static_cast<int>(n % 2 * 16 + n % 8 / 2 * 4), zero = code_of(zeros[held], n);
      const float scale = scale_value(w.part[1], type, group * w.rows + n);
      float* to = out + r * stride;
      for (int c = 0; c < 32; ++c) to[c] = static_cast<float>(static_cast<int>(of[c] >> shift & 15) - zero) * scale;
    }
  }
};

}  // namespace
}  // namespace peft_ext
