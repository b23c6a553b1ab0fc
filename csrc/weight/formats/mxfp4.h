// MXFP4 (OCP Microscaling): W[n, k] = e2m1(code) * 2^(scale - 127).
//
// part 0: codes, uint8 [N, K / 2], two per byte, the low nibble is the even column;
// part 1: scales, one byte for 32 columns [N, K / 32]. K is a multiple of 32.
// Source: transformers integrations/mxfp4.py, whose torch.ldexp takes scale 255 for 2^128, not for a NaN.
#pragma once

#include "weight/formats/codes.h"

namespace peft_ext {
namespace {

struct Mxfp4 {
  static const char* refused(const PackedView& w) {
    return w.group == 32 && w.columns % 32 == 0 ? nullptr : "group 32, and a multiple of 32 columns";
  }
  static int64_t part_bytes(const PackedView& w, int part) {
    return part == 0 ? w.rows * (w.columns / 2) : part == 1 ? w.rows * (w.columns / 32) : 0;
  }

  // Returns 2^(byte - 128), which is finite for every byte, unlike 2^(byte - 127).
  static float half_scale(const PackedView& w, int64_t group) {
    const uint32_t byte = static_cast<const uint8_t*>(w.part[1])[group];
    return bits_to_float(byte < 2 ? 0x00200000u << byte : (byte - 1) << 23);
  }

  static float value(const PackedView& w, int64_t row, int64_t column) {
    const int64_t flat = row * w.columns + column;
    return e2m1_doubled(nibble_code(w.part[0], flat, 0)) * half_scale(w, flat / 32);
  }

#ifndef __CUDACC__
  static bool runs(const PackedView&) { return true; }
  static void decode32(const PackedView& w, int64_t row, int64_t column, float* out) {
    const int64_t flat = row * w.columns + column;
    const float scale = half_scale(w, flat / 32);
    uint32_t codes[32];
    nibble_codes(static_cast<const uint8_t*>(w.part[0]) + flat / 2, 0, codes);
#pragma GCC unroll 1
    for (int i = 0; i < 32; ++i) out[i] = e2m1_doubled(codes[i]) * scale;
  }

  static constexpr Nibbles kNibbles = Nibbles::kLowFirst;
  static constexpr bool kContiguous = true;
  static constexpr int kScaleColumns = 32;
  static bool has_nibbles(const PackedView&) { return true; }
  static const float* table16() { return kE2m1Doubled; }
  static const uint8_t* codes32(const PackedView& w, int64_t row, int64_t column) {
    return static_cast<const uint8_t*>(w.part[0]) + (row * w.columns + column) / 2;
  }
  static void entries(const PackedView& w, int64_t row, int64_t column, float* out) {
    const float scale = half_scale(w, (row * w.columns + column) / 32);
    for (int i = 0; i < 16; ++i) out[i] = kE2m1Doubled[i] * scale;
  }
  static void scales(const PackedView& w, int64_t row, int64_t column, int64_t count, float* scale) {
    const int64_t first = (row * w.columns + column) / 32;
    for (int64_t i = 0; i < count; ++i) scale[i] = half_scale(w, first + i);
  }
#endif
};

}  // namespace
}  // namespace peft_ext
