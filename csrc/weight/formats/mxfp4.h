// MXFP4 (OCP Microscaling): W[n, k] = e2m1(code) * 2^(scale - 127).
//
// part 0: codes, uint8 [N, K / 2], two per byte, the low nibble is the even column;
// part 1: scales, one e8m0 byte for 32 columns [N, K / 32]. K is a multiple of 32.
#pragma once

#include "weight/packed_view.h"

namespace peft_ext {
namespace {

struct Mxfp4 {
  PEFT_EXT_BOTH static float value(const PackedView& w, int64_t row, int64_t column) {
    const int64_t flat = row * w.columns + column;
    const int byte = static_cast<const uint8_t*>(w.part[0])[flat / 2];
    const float scale = e8m0_value(static_cast<const uint8_t*>(w.part[1])[flat / 32]);
    return e2m1_value(column % 2 == 0 ? byte & 15 : byte >> 4) * scale;
  }
};

}  // namespace
}  // namespace peft_ext
