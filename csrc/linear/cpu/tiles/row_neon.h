// Defines Row, 16 sums of a block in four registers, for Arm. See block.h. Include this file after the target pragma
// (cpu/target_<isa>.h).
#pragma once

#include "cpu/simd_neon.h"

namespace peft_ext {
namespace {

struct Row {
  static constexpr int kWidth = 16, kParts = kWidth / Vec::kWidth;
  Vec part[kParts];

  // Returns a Row whose part i is the Vec f(i).
  template <typename F>
  static Row of(const F& f) {
    return {{f(0), f(1), f(2), f(3)}};
  }
  static Row zero() { return broadcast(0.0f); }
  static Row broadcast(float value) {
    return of([&](int) { return Vec::broadcast(value); });
  }
  static Row load(const float* x) {
    return of([&](int i) { return Vec::load(x + i * Vec::kWidth); });
  }
  static Row fma(Row a, Row b, Row c) {
    return of([&](int i) { return Vec::fma(a.part[i], b.part[i], c.part[i]); });
  }
  static Row add(Row a, Row b) {
    return of([&](int i) { return Vec::add(a.part[i], b.part[i]); });
  }
  static Row mul(Row a, Row b) {
    return of([&](int i) { return Vec::mul(a.part[i], b.part[i]); });
  }
  // Returns a in the lanes whose bit in `bits` is set, and b in the other lanes.
  static Row where(uint32_t bits, Row a, Row b) {
    return of([&](int i) { return Vec::where(bits >> i * Vec::kWidth, a.part[i], b.part[i]); });
  }
  // Loads the first `count` of 16 values, and sets the other values to zero.
  template <typename T>
  static Row load_as(const T* x, int64_t count) {
    T lanes[kWidth] = {};
    memcpy(lanes, x, static_cast<size_t>(count) * sizeof(T));
    return of([&](int i) { return Vec::load_as(lanes + i * Vec::kWidth); });
  }
  void store(float* x) const {
    for (int i = 0; i < kParts; ++i) part[i].store(x + i * Vec::kWidth);
  }
  void store_as(float* x, int64_t count) const {
    float lanes[kWidth];
    store(lanes);
    memcpy(x, lanes, static_cast<size_t>(count) * sizeof(float));
  }
};

constexpr int kLowRankRows = 4;  // four objects of type Row take 16 registers

inline void transposed(const float* part, Row* rows) {
  for (int r = 0; r < 16; r += 4)
    for (int i = 0; i < Row::kParts; ++i) {
      const float* from = part + r * 16 + i * 4;
      const float32x4_t a = vld1q_f32(from), b = vld1q_f32(from + 16), c = vld1q_f32(from + 32),
                        d = vld1q_f32(from + 48);
      const float64x2_t ab[2] = {vreinterpretq_f64_f32(vtrn1q_f32(a, b)), vreinterpretq_f64_f32(vtrn2q_f32(a, b))};
      const float64x2_t cd[2] = {vreinterpretq_f64_f32(vtrn1q_f32(c, d)), vreinterpretq_f64_f32(vtrn2q_f32(c, d))};
      for (int lane = 0; lane < 2; ++lane) {
        rows[4 * i + lane].part[r / 4] = {vreinterpretq_f32_f64(vtrn1q_f64(ab[lane], cd[lane]))};
        rows[4 * i + 2 + lane].part[r / 4] = {vreinterpretq_f32_f64(vtrn2q_f64(ab[lane], cd[lane]))};
      }
    }
}

// Rounds eight sums to bfloat16, with one instruction for each four sums.
inline bfloat16x8_t rounded8(Vec first, Vec second) {
  return vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(first.v), second.v);
}

inline void store_row(bf16* out, const Row& first, const Row& second, int64_t count) {
  alignas(16) bf16 words[2 * Row::kWidth];
  bf16* to = count >= 2 * Row::kWidth ? out : words;
  for (int i = 0; i < Row::kParts; i += 2) {
    vst1q_u16(words_of(to + i * 4), vreinterpretq_u16_bf16(rounded8(first.part[i], first.part[i + 1])));
    vst1q_u16(words_of(to + 16 + i * 4), vreinterpretq_u16_bf16(rounded8(second.part[i], second.part[i + 1])));
  }
  if (to == words) memcpy(out, words, static_cast<size_t>(count) * sizeof(bf16));
}

}  // namespace
}  // namespace peft_ext
