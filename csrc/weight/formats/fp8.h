// FP8: W[n, k] = e4m3(code) * scale, one scale for a block of rows and columns.
//
// part 0: codes, e4m3 (without infinities) [N, K], one per byte;
// part 1: scales [ceil(N / rows), ceil(K / columns)] of the dtype that `option` names. The last blocks of a row or of a
//         column may be incomplete.
// Flags: bits 0 to 5: log2 of the rows of a block; bits 6 to 11: log2 of the columns of a block; the value kAll stands
// for all rows or columns. Sources: transformers integrations/finegrained_fp8.py; compressed-tensors
// quantization/lifecycle/forward.py.
#pragma once

#include "weight/formats/codes.h"

namespace peft_ext {
namespace {

struct Fp8 {
  // A shift by kAll gives index 0 for every row or column.
  static constexpr int kAll = 63;

  static int row_shift(const PackedView& w) { return format_flags(w.option) & 63; }
  static int column_shift(const PackedView& w) { return format_flags(w.option) >> 6 & 63; }

  // Returns the number of blocks that hold `count` rows or columns.
  static int64_t blocks(int64_t count, int shift) { return count == 0 ? 0 : ((count - 1) >> shift) + 1; }

  static const char* refused(const PackedView& w) {
    const int shift = column_shift(w);
    const bool all = shift == kAll;
    return (all || shift < 32) && w.group == (all ? 0 : int64_t{1} << shift) && scale_type(w.option) <= ScaleType::kE8M0
               ? nullptr
               : "a group that is 0 or a power of two, the group's log2 in the flags, and scales that are not e4m3";
  }
  static int64_t part_bytes(const PackedView& w, int part) {
    const ScaleType type = scale_type(w.option);
    const int64_t width = type == ScaleType::kF32 ? 4 : type == ScaleType::kE8M0 ? 1 : 2;
    if (part == 0) return w.rows * w.columns;
    return part == 1 ? blocks(w.rows, row_shift(w)) * blocks(w.columns, column_shift(w)) * width : 0;
  }

  static float scale(const PackedView& w, int64_t row, int64_t column) {
    const int64_t block = (row >> row_shift(w)) * blocks(w.columns, column_shift(w)) + (column >> column_shift(w));
    return scale_value(w.part[1], scale_type(w.option), block);
  }

  static float value(const PackedView& w, int64_t row, int64_t column) {
    const uint8_t byte = static_cast<const uint8_t*>(w.part[0])[row * w.columns + column];
    return e4m3_value(byte) * scale(w, row, column);
  }

#ifndef __CUDACC__
  static constexpr bool kE4m3 = true;
  static const uint8_t* codes(const PackedView& w, int64_t row, int64_t column) {
    return static_cast<const uint8_t*>(w.part[0]) + row * w.columns + column;
  }

  static bool runs(const PackedView& w) { return w.columns % 32 == 0 && column_shift(w) >= 5; }
  static void decode32(const PackedView& w, int64_t row, int64_t column, float* out) {
    const uint8_t* bytes = codes(w, row, column);
    const float factor = scale(w, row, column);
    for (int first = 0; first < 32; first += 8) {
      uint32_t eight[8];
      for (int i = 0; i < 8; ++i) eight[i] = bytes[first + i];
#pragma GCC unroll 1
      for (int i = 0; i < 8; ++i) out[first + i] = e4m3_value(eight[i]) * factor;
    }
  }
#endif
};

}  // namespace
}  // namespace peft_ext
