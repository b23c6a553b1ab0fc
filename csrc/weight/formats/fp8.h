// FP8: W[n, k] = e4m3(code) * scale, one scale for a block of rows and columns.
//
// part 0: codes, e4m3 (without infinities) [N, K], one per byte;
// part 1: scales [ceil(N / rows), ceil(K / columns)] of the dtype that `option` names. The last blocks of a row or of a
//         column may be incomplete.
// Flags: bits 0 to 5: log2 of the rows of a block; bits 6 to 11: log2 of the columns of a block; kAll: all.
// Sources: transformers integrations/finegrained_fp8.py; compressed-tensors quantization/lifecycle/forward.py.
#pragma once

#include "weight/formats/codes.h"

namespace peft_ext {
namespace {

struct Fp8 {
  // A shift by kAll gives index 0 for every row or column.
  static constexpr int kAll = 63;

  PEFT_EXT_BOTH static float scale(const PackedView& w, int64_t row, int64_t column) {
    const int rows = format_flags(w.option) & 63, columns = format_flags(w.option) >> 6 & 63;
    const int64_t across = ((w.columns - 1) >> columns) + 1;
    return scale_value(w.part[1], scale_type(w.option), (row >> rows) * across + (column >> columns));
  }

  PEFT_EXT_BOTH static float value(const PackedView& w, int64_t row, int64_t column) {
    const uint8_t byte = static_cast<const uint8_t*>(w.part[0])[row * w.columns + column];
    return e4m3_code_value(byte) * scale(w, row, column);
  }

  static bool runs(const PackedView& w) { return w.columns % 32 == 0 && (format_flags(w.option) >> 6 & 63) >= 5; }

  static void decode32(const PackedView& w, int64_t row, int64_t column, float* out) {
    const uint8_t* bytes = static_cast<const uint8_t*>(w.part[0]) + row * w.columns + column;
    const float factor = scale(w, row, column);
    for (int first = 0; first < 32; first += 8) {
      uint32_t codes[8];
      for (int i = 0; i < 8; ++i) codes[i] = bytes[first + i];
#pragma GCC unroll 1
      for (int i = 0; i < 8; ++i) out[first + i] = e4m3_code_value(codes[i]) * factor;
    }
  }
};

}  // namespace
}  // namespace peft_ext
