// The vector type Vec for NEON, which every 64-bit Arm CPU has, with 4 float lanes, and dropout loops with NEON.
#pragma once

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "common/dtype.h"
#include "common/philox.h"

namespace peft_ext {
namespace {

inline const uint16_t* words_of(const bf16* x) { return reinterpret_cast<const uint16_t*>(x); }
inline const uint16_t* words_of(const f16* x) { return reinterpret_cast<const uint16_t*>(x); }
inline uint16_t* words_of(bf16* x) { return reinterpret_cast<uint16_t*>(x); }
inline uint16_t* words_of(f16* x) { return reinterpret_cast<uint16_t*>(x); }

inline float32x4_t widen_bf16(uint16x4_t words) { return vreinterpretq_f32_u32(vshll_n_u16(words, 16)); }
inline float32x4_t widen_f16(uint16x4_t words) { return vcvt_f32_f16(vreinterpret_f16_u16(words)); }

inline float32x4_t load4(const float* x) { return vld1q_f32(x); }
inline float32x4_t load4(const bf16* x) { return widen_bf16(vld1_u16(words_of(x))); }
inline float32x4_t load4(const f16* x) { return widen_f16(vld1_u16(words_of(x))); }

inline uint16x4_t round_bf16(float32x4_t value) {
  const uint32x4_t bits = vreinterpretq_u32_f32(value);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint16x4_t rounded = vshrn_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), 16);
  return vbsl_u16(vmovn_u32(vceqq_f32(value, value)), rounded, vdup_n_u16(0x7fc0));
}
inline uint16x4_t round_f16(float32x4_t value) { return vreinterpret_u16_f16(vcvt_f16_f32(value)); }

inline void store4(float* out, float32x4_t value) { vst1q_f32(out, value); }
inline void store4(bf16* out, float32x4_t value) { vst1_u16(words_of(out), round_bf16(value)); }
inline void store4(f16* out, float32x4_t value) { vst1_u16(words_of(out), round_f16(value)); }

// A vector of four floats. Each instruction set has a Vec with these members, so that one source of a kernel serves all
// instruction sets.
struct Vec {
  static constexpr int kWidth = 4;
  float32x4_t v;
  static Vec zero() { return {vdupq_n_f32(0.0f)}; }
  static Vec broadcast(float value) { return {vdupq_n_f32(value)}; }
  static Vec load(const float* x) { return {vld1q_f32(x)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  static Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  static Vec sub(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  Vec reciprocal() const { return {vdivq_f32(vdupq_n_f32(1.0f), v)}; }
  // min and max return b if a or b is NaN.
  static Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
  static Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
  // Returns b in the lanes where a is greater than 0, and c in all other lanes.
  static Vec positive(Vec a, Vec b, Vec c) { return {vbslq_f32(vcgtzq_f32(a.v), b.v, c.v)}; }
  // Returns a in the lanes i for which bit i of `bits` is set, and b in all other lanes.
  static Vec where(uint32_t bits, Vec a, Vec b) {
    static constexpr uint32_t kLane[] = {1, 2, 4, 8};
    return {vbslq_f32(vtstq_u32(vdupq_n_u32(bits), vld1q_u32(kLane)), a.v, b.v)};
  }
  Vec abs() const { return {vabsq_f32(v)}; }
  Vec round() const { return {vrndnq_f32(v)}; }
  // Returns a * 2^whole for integers `whole` from -126 to 127. If `whole` is NaN, the result is a.
  static Vec times_exp2(Vec a, Vec whole) {
    const int32x4_t biased = vaddq_s32(vcvtq_s32_f32(whole.v), vdupq_n_s32(127));
    return mul(a, {vreinterpretq_f32_s32(vshlq_n_s32(biased, 23))});
  }
  float sum() const { return vaddvq_f32(v); }
  // Returns a vector whose lane i is the sum of all lanes of the vector `of[i]`.
  static Vec sums_of(const Vec (&of)[kWidth]) {
    return {vpaddq_f32(vpaddq_f32(of[0].v, of[1].v), vpaddq_f32(of[2].v, of[3].v))};
  }
  float largest() const { return vmaxnmvq_f32(v); }
  void store(float* x) const { vst1q_f32(x, v); }

  // Loads kWidth values of any element type as floats. With `count`, only the first `count` values are loaded, and the
  // remaining lanes are 0.
  template <typename T>
  static Vec load_as(const T* x) {
    return {load4(x)};
  }
  template <typename T>
  static Vec load_as(const T* x, int64_t count) {
    T lanes[kWidth] = {};
    memcpy(lanes, x, static_cast<size_t>(count) * sizeof(T));
    return {load4(lanes)};
  }
  template <typename T>
  void store_as(T* x) const {
    store4(x, v);
  }
  template <typename T>
  void store_as(T* x, int64_t count) const {
    T lanes[kWidth];
    store4(lanes, v);
    memcpy(x, lanes, static_cast<size_t>(count) * sizeof(T));
  }
  // Returns the lanes rounded to the element type T, as floats.
  template <typename T>
  Vec rounded() const;
  // Returns the first `count` lanes, and zeros in the remaining lanes.
  Vec first(int64_t count) const {
    const uint32_t lanes[kWidth] = {0, 1, 2, 3};
    const uint32x4_t inside = vcltq_u32(vld1q_u32(lanes), vdupq_n_u32(static_cast<uint32_t>(count)));
    return {vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), inside))};
  }
};

template <>
inline Vec Vec::rounded<float>() const {
  return *this;
}
template <>
inline Vec Vec::rounded<bf16>() const {
  return {widen_bf16(round_bf16(v))};
}
template <>
inline Vec Vec::rounded<f16>() const {
  return {widen_f16(round_f16(v))};
}

// A vector of two 64-bit lanes for Philox (see philox_impl.h); the low half of each lane is a 32-bit word.
struct Lanes {
  static constexpr int kWidth = 2;
  uint64x2_t v;
  static Lanes broadcast(uint64_t value) { return {vdupq_n_u64(value)}; }
  static Lanes counters(uint64_t first) { return {vcombine_u64(vcreate_u64(first), vcreate_u64(first + 1))}; }
  static Lanes listed(const uint64_t* counters) { return {vld1q_u64(counters)}; }
  static Lanes mul32(Lanes a, Lanes b) { return {vmull_u32(vmovn_u64(a.v), vmovn_u64(b.v))}; }
  static Lanes xor3(Lanes a, Lanes b, Lanes c) { return {veorq_u64(veorq_u64(a.v, b.v), c.v)}; }
  Lanes high() const { return {vshrq_n_u64(v, 32)}; }
  static void store_words(Lanes w0, Lanes w1, Lanes w2, Lanes w3, uint16_t* out) {
    const uint64x2_t first = vsliq_n_u64(w0.v, w1.v, 32), second = vsliq_n_u64(w2.v, w3.v, 32);
    vst1q_u16(out, vreinterpretq_u16_u64(vzip1q_u64(first, second)));
    vst1q_u16(out + 8, vreinterpretq_u16_u64(vzip2q_u64(first, second)));
  }
};

// Replaces values[i] by values[i] * scale if draws[i] >= threshold, otherwise by 0.
inline void apply_dropout(const Dropout& dropout, const uint16_t* draws, int64_t count, float* values) {
  const uint32x4_t threshold = vdupq_n_u32(dropout.threshold);
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const uint32x4_t keep = vcgeq_u32(vmovl_u16(vld1_u16(draws + i)), threshold);
    const float32x4_t scaled = vmulq_n_f32(vld1q_f32(values + i), dropout.scale);
    vst1q_f32(values + i, vreinterpretq_f32_u32(vandq_u32(keep, vreinterpretq_u32_f32(scaled))));
  }
  for (; i < count; ++i) values[i] = draws[i] >= dropout.threshold ? values[i] * dropout.scale : 0.0f;
}

// Writes the dropout mask as bits to ceil(count / 32) words: bit i is draws[i] >= threshold.
inline void keep_bits(const Dropout& dropout, const uint16_t* draws, int64_t count, uint32_t* words) {
  const uint32_t bit[4] = {1, 2, 4, 8};
  const uint32x4_t bits = vld1q_u32(bit), threshold = vdupq_n_u32(dropout.threshold);
  for (int64_t i = 0; i < count; i += 32) {
    const int64_t here = min_i64(32, count - i);
    uint32_t word = 0;
    int64_t j = 0;
    for (; j + 4 <= here; j += 4) {
      const uint32x4_t keep = vcgeq_u32(vmovl_u16(vld1_u16(draws + i + j)), threshold);
      word |= vaddvq_u32(vandq_u32(keep, bits)) << j;
    }
    for (; j < here; ++j) word |= static_cast<uint32_t>(draws[i + j] >= dropout.threshold) << j;
    words[i / 32] = word;
  }
}

template <typename T>
inline void widen(const T* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) vst1q_f32(out + i, load4(x + i));
  for (; i < count; ++i) out[i] = to_float(x[i]);
}

template <typename T>
inline void narrow(const float* x, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) store4(out + i, vld1q_f32(x + i));
  for (; i < count; ++i) out[i] = from_float<T>(x[i]);
}

}  // namespace
}  // namespace peft_ext
