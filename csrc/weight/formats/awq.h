// AWQ (GEMM layout), 4 bits: W[n, k] = (code[k, n] - zero[g, n]) * scale[g, n], where g is k / group. The weight is
// stored transposed, and a word holds eight rows n of one column k, in the order 0 2 4 6 1 3 5 7. The difference
// code - zero is exact.
//
// part 0: qweight, int32 [K, N / 8]; part 1: scales [G, N]; part 2: qzeros, int32 [G, N / 8].
#pragma once

#include "weight/formats/int_codes.h"

namespace peft_ext {
namespace {

struct Awq {
  static constexpr bool kRowBlocks = true;

  static const char* refused(const PackedView& w) {
    return has_float_scales(w) && code_bits(w.option) == 4 && format_flags(w.option) == 0 && w.rows % 8 == 0 &&
                   (w.group == 0 || w.columns % w.group == 0)
               ? nullptr
               : "a multiple of 8 rows, groups that divide the columns, 4 bits, and scales of float32, bfloat16 or "
                 "float16";
  }

  static int64_t part_bytes(const PackedView& w, int part) {
    if (part == 0) return 4 * w.columns * (w.rows / 8);
    if (part == 1) return scale_bytes(w, groups_of(w) * w.rows);
    return part == 2 ? 4 * groups_of(w) * (w.rows / 8) : 0;
  }

  // Returns by how many bits the code of a row is shifted in its word.
  static int shift_of(int64_t row) { return static_cast<int>(row % 2 * 16 + row % 8 / 2 * 4); }

  static float value(const PackedView& w, int64_t row, int64_t column) {
    const int64_t group = group_at(w, nullptr, column), words = w.rows / 8;
    const uint32_t code = static_cast<const uint32_t*>(w.part[0])[column * words + row / 8] >> shift_of(row) & 15;
    const uint32_t zero = static_cast<const uint32_t*>(w.part[2])[group * words + row / 8] >> shift_of(row) & 15;
    return static_cast<float>(static_cast<int>(code) - static_cast<int>(zero)) *
           scale_value(w.part[1], scale_type(w.option), group * w.rows + row);
  }

#ifndef __CUDACC__
  static bool runs(const PackedView& w) { return w.columns % 32 == 0 && w.group % 32 == 0; }

  static void decode32(const PackedView& w, int64_t row, int64_t column, float* out) {
    decode_rows(w, row, 1, column, out, 32);
  }

  // Writes W[row + r, column + c] to out[r * stride + c] for r below `rows` (16 at most) and c below 32. decode_rows
  // reads each word once, for the eight rows of the word.
  static void decode_rows(const PackedView& w, int64_t row, int64_t rows, int64_t column, float* out, int64_t stride) {
    const int64_t group = group_in_order(w, column), words = w.rows / 8;
    const uint32_t* from = static_cast<const uint32_t*>(w.part[0]) + column * words;
    const uint32_t* zeros = static_cast<const uint32_t*>(w.part[2]) + group * words;
    float scales[16];
    with_scale_type(scale_type(w.option), [&](auto scale) {
      for (int64_t r = 0; r < rows; ++r)
        scales[r] = scale_value(w.part[1], decltype(scale)::kType, group * w.rows + row + r);
    });
    uint32_t codes[32];
    int64_t held = -1;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = row + r;
      if (n / 8 != held) {
        held = n / 8;
        for (int c = 0; c < 32; ++c) codes[c] = from[c * words + held];
      }
      const int shift = shift_of(n), zero = static_cast<int>(zeros[held] >> shift & 15);
      float* to = out + r * stride;
      for (int c = 0; c < 32; ++c)
        to[c] = static_cast<float>(static_cast<int>(codes[c] >> shift & 15) - zero) * scales[r];
    }
  }
#endif
};

}  // namespace
}  // namespace peft_ext
