// NVFP4: W[n, k] = e2m1(code) * (scale * global), or e2m1(code) * (scale / global) if the flag kReciprocal is set.
//
// part 0: codes, uint8 [N, K / 2], two per byte, the low nibble is the even column;
// part 1: scales, one e4m3 byte for 16 columns [N, K / 16]. K is a multiple of 16;
// part 2: global, one float32, or two with the flag kTwoGlobals: for the first and for the second half of the rows,
// such as the gate and up of an expert. ModelOpt stores the global factor; compressed-tensors stores the reciprocal of
// the factor. Sources: compressed-tensors compressors/nvfp4, ModelOpt qtensor/nvfp4_tensor.py. Code 8 is -0 in
// compressed-tensors and +0 in ModelOpt.
#pragma once

#include "weight/formats/codes.h"

namespace peft_ext {
namespace {

struct Nvfp4 {
  static constexpr int kReciprocal = 1, kTwoGlobals = 2;  // flags of `option`

  static bool two_globals(const PackedView& w) { return format_flags(w.option) & kTwoGlobals; }

  static const char* refused(const PackedView& w) {
    return w.group == 16 && w.columns % 16 == 0 && (!two_globals(w) || w.rows % 2 == 0)
               ? nullptr
               : "group 16, a multiple of 16 columns, and an even number of rows with two global scales";
  }
  static int64_t part_bytes(const PackedView& w, int part) {
    const int64_t sizes[] = {w.rows * (w.columns / 2), w.rows * (w.columns / 16), two_globals(w) ? 8 : 4};
    return part < 3 ? sizes[part] : 0;
  }

  static bool reciprocal(const PackedView& w) { return format_flags(w.option) & kReciprocal; }

  // Returns the global scale of the row in which a group of 16 columns lies.
  static float global_scale(const PackedView& w, int64_t group) {
    const bool second = two_globals(w) && group >= w.rows / 2 * (w.columns / 16);
    return static_cast<const float*>(w.part[2])[second ? 1 : 0];
  }

  static float scale(const PackedView& w, int64_t group) {
    const float local = e4m3_value(static_cast<const uint8_t*>(w.part[1])[group]), global = global_scale(w, group);
    return reciprocal(w) ? local / global : local * global;
  }

  // `zero` is -0 or +0: the sum x + zero is x for every x but -0, and -0 + zero is `zero`.
  static float code_value(uint32_t code, float zero) { return e2m1_doubled(code) * 0.5f + zero; }

  static float value(const PackedView& w, int64_t row, int64_t column) {
    const int64_t flat = row * w.columns + column;
    return code_value(nibble_code(w.part[0], flat, 0), reciprocal(w) ? -0.0f : 0.0f) * scale(w, flat / 16);
  }

#ifndef __CUDACC__
  static bool runs(const PackedView& w) { return w.columns % 32 == 0; }
  static void decode32(const PackedView& w, int64_t row, int64_t column, float* out) {
    const int64_t flat = row * w.columns + column;
    const float zero = reciprocal(w) ? -0.0f : 0.0f;
    const float scales[2] = {scale(w, flat / 16), scale(w, flat / 16 + 1)};
    uint32_t codes[32];
    nibble_codes(static_cast<const uint8_t*>(w.part[0]) + flat / 2, 0, codes);
#pragma GCC unroll 1
    for (int i = 0; i < 16; ++i) out[i] = code_value(codes[i], zero) * scales[0];
#pragma GCC unroll 1
    for (int i = 16; i < 32; ++i) out[i] = code_value(codes[i], zero) * scales[1];
  }

  static constexpr Nibbles kNibbles = Nibbles::kLowFirst;
  static constexpr bool kContiguous = true;
  static constexpr int kScaleColumns = 16;
  static bool has_nibbles(const PackedView&) { return true; }
  static const float* table16() { return kE2m1; }
  static const uint8_t* codes32(const PackedView& w, int64_t row, int64_t column) {
    return static_cast<const uint8_t*>(w.part[0]) + (row * w.columns + column) / 2;
  }
  static void entries(const PackedView& w, int64_t row, int64_t column, float* out) {
    const float zero = reciprocal(w) ? -0.0f : 0.0f, factor = scale(w, (row * w.columns + column) / 16);
    for (int i = 0; i < 16; ++i) out[i] = (kE2m1[i] + zero) * factor;
  }
  static void scales(const PackedView& w, int64_t row, int64_t column, int64_t count, float* scale) {
    const int64_t group = (row * w.columns + column) / 16;
    const uint8_t* locals = static_cast<const uint8_t*>(w.part[1]) + group;
    const float global = global_scale(w, group);
    if (reciprocal(w)) {
      for (int64_t i = 0; i < count; ++i) scale[i] = e4m3_value(locals[i]) / global;
    } else {
      for (int64_t i = 0; i < count; ++i) scale[i] = e4m3_value(locals[i]) * global;
    }
  }
#endif
};

}  // namespace
}  // namespace peft_ext
