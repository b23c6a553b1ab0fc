// MXFP4 (OCP Microscaling): W[n, k] = e2m1(code) * 2^(scale - 127).
//
// part 0: codes, uint8 [N, K / 2], two per byte, the low nibble is the even column;
// part 1: scales, one e8m0 byte for 32 columns [N, K / 32]. K is a multiple of 32.
#pragma once

#include "weight/packed_view.h"

namespace peft_ext {
namespace {

struct Mxfp4 {
  PEFT_EXT_BOTH static const char* refused(const PackedView& w) {
    return w.group == 32 && w.columns % 32 == 0 ? nullptr : "group 32, and a multiple of 32 columns";
  }
  PEFT_EXT_BOTH static int64_t part_bytes(const PackedView& w, int part) {
    return part == 0 ? w.rows * (w.columns / 2) : part == 1 ? w.rows * (w.columns / 32) : 0;
  }

  PEFT_EXT_BOTH static float value(const PackedView& w, int64_t row, int64_t column) {
    const int64_t flat = row * w.columns + column;
    const int byte = static_cast<const uint8_t*>(w.part[0])[flat / 2];
    const float scale = e8m0_value(static_cast<const uint8_t*>(w.part[1])[flat / 32]);
    return e2m1_value(column % 2 == 0 ? byte & 15 : byte >> 4) * scale;
  }

#ifndef __CUDACC__
  static bool runs(const PackedView&) { return true; }
  static void decode32(const PackedView& w, int64_t row, int64_t column, float* out) {
    const int64_t flat = row * w.columns + column;
    const uint8_t* bytes = static_cast<const uint8_t*>(w.part[0]) + flat / 2;
    const float scale = e8m0_value(static_cast<const uint8_t*>(w.part[1])[flat / 32]);
    for (int i = 0; i < 16; ++i) {
      out[2 * i] = e2m1_value(bytes[i] & 15) * scale;
      out[2 * i + 1] = e2m1_value(bytes[i] >> 4) * scale;
    }
  }
#endif
};

}  // namespace
}  // namespace peft_ext
