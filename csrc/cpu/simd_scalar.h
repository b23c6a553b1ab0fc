// The vector type Vec of the path `scalar`, with one float lane, and the dropout loops of this path.
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
  Vec reciprocal() const { return {1.0f / v}; }
  // min and max return b if a or b is NaN.
  static Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
  static Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
  // Returns b if a is greater than 0, otherwise c (also if a is NaN).
  static Vec positive(Vec a, Vec b, Vec c) { return a.v > 0.0f ? b : c; }
  // Returns a if the lowest bit of `bits` is set, otherwise b.
  static Vec where(uint32_t bits, Vec a, Vec b) { return bits & 1 ? a : b; }
  Vec abs() const { return {bits_to_float(float_to_bits(v) & 0x7fffffff)}; }
  // Rounds a value of magnitude below 2^22 to an integer: 1.5 · 2^23 is added, which leaves no mantissa bits for a
  // fraction, and is then subtracted.
  Vec round() const { return {(v + 12582912.0f) - 12582912.0f}; }
  // Returns a * 2^whole for integers `whole` from -126 to 127. If `whole` is NaN, the result is a.
  static Vec times_exp2(Vec a, Vec whole) {
    const int32_t exponent = whole.v == whole.v ? static_cast<int32_t>(whole.v) : 0;
    return mul(a, {bits_to_float(static_cast<uint32_t>(exponent + 127) << 23)});
  }
  float sum() const { return v; }
  static Vec sums_of(const Vec (&of)[1]) { return of[0]; }
  float largest() const { return v; }
  void store(float* x) const { *x = v; }

  // Loads a value of any element type as a float. The overloads with an argument `count` are never called, because one
  // lane is always a whole vector.
  template <typename T>
  static Vec load_as(const T* x) {
    return {to_float(*x)};
  }
  template <typename T>
  static Vec load_as(const T*, int64_t) {
    return zero();
  }
  template <typename T>
  void store_as(T* x) const {
    *x = from_float<T>(v);
  }
  template <typename T>
  void store_as(T*, int64_t) const {}
  // Returns the value rounded to the element type T, as a float.
  template <typename T>
  Vec rounded() const {
    return {to_float(from_float<T>(v))};
  }
  Vec first(int64_t) const { return zero(); }
};

// One 64-bit lane for Philox (see philox_impl.h). The lower half of the lane is a 32-bit word.
struct Lanes {
  static constexpr int kWidth = 1;
  uint64_t v;
  static Lanes broadcast(uint64_t value) { return {value}; }
  static Lanes counters(uint64_t first) { return {first}; }
  static Lanes listed(const uint64_t* counters) { return {*counters}; }
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

// Replaces values[i] by values[i] * scale if draws[i] >= threshold, otherwise by 0.
inline void apply_dropout(const Dropout& dropout, const uint16_t* draws, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = draws[i] >= dropout.threshold ? values[i] * dropout.scale : 0.0f;
}

// Writes the dropout mask as bits to ceil(count / 32) words: bit i is draws[i] >= threshold.
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
