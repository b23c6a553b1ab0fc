// The vector of one value: the portable path.
#pragma once

#include <math.h>
#include <stdint.h>

#include "common/dtype.h"
#include "common/philox.h"

namespace peft_ext {
namespace {

struct Vec {
  static constexpr int kWidth = 1;
  float v;
  static Vec zero() { return {0.0f}; }
  static Vec broadcast(float value) { return {value}; }
  static Vec load(const float* x) { return {*x}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  static Vec add(Vec a, Vec b) { return {a.v + b.v}; }
  static Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
  static Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
  static Vec div(Vec a, Vec b) { return {a.v / b.v}; }
  // b where one of them is NaN.
  static Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
  static Vec round(Vec a) { return {nearbyintf(a.v)}; }
  // a 2^n of an integral n from -126 to 127.
  static Vec scale2(Vec a, Vec n) { return {ldexpf(a.v, n.v == n.v ? static_cast<int>(n.v) : 0)}; }
  // 0 where at < bound.
  static Vec zero_below(Vec a, Vec at, Vec bound) { return {at.v < bound.v ? 0.0f : a.v}; }
  float sum() const { return v; }
  float largest() const { return v; }
  void store(float* x) const { *x = v; }
};

template <typename T>
inline Vec load_vec(const T* x) {
  return {to_float(*x)};
}
template <typename T>
inline void store_vec(T* out, Vec value) {
  *out = from_float<T>(value.v);
}

// One 32-bit word in a 64-bit lane: see philox_impl.h.
struct Lanes {
  static constexpr int kWidth = 1;
  uint64_t v;
  static Lanes broadcast(uint64_t value) { return {value}; }
  static Lanes counters(uint64_t first) { return {first}; }
  static Lanes mul32(Lanes a, Lanes b) { return {(a.v & 0xffffffffu) * (b.v & 0xffffffffu)}; }
  static Lanes xor3(Lanes a, Lanes b, Lanes c) { return {a.v ^ b.v ^ c.v}; }
  Lanes high() const { return {v >> 32}; }
  static void store_words(Lanes w0, Lanes w1, Lanes w2, Lanes w3, uint16_t* out) {
    const uint64_t words[4] = {w0.v, w1.v, w2.v, w3.v};
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = static_cast<uint16_t>(words[i]);
      out[2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);
    }
  }
};

// values[i] -> keep ? values[i] * scale : 0
inline void apply_dropout(const Dropout& dropout, const uint16_t* draws, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = draws[i] >= dropout.threshold ? values[i] * dropout.scale : 0.0f;
}

// The mask as bits, count / 32 words and one for the rest: bit i is draws[i] >= threshold.
inline void keep_bits(const Dropout& dropout, const uint16_t* draws, int64_t count, uint32_t* words) {
  for (int64_t i = 0; i < count; i += 32) {
    uint32_t word = 0;
    for (int64_t j = 0; j < min_i64(32, count - i); ++j)
      word |= static_cast<uint32_t>(draws[i + j] >= dropout.threshold) << j;
    words[i / 32] = word;
  }
}

template <typename T>
inline void widen(const T* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(x[i]);
}

template <typename T>
inline void narrow(const float* x, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(x[i]);
}

}  // namespace
}  // namespace peft_ext
