// The vector type Vec for AVX2, with 8 float lanes, and dropout loops with AVX2. Include this file after target_avx2.h.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "common/dtype.h"
#include "common/philox.h"

namespace peft_ext {
namespace {

inline __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
inline __m256 load8(const bf16* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 load8(const f16* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }

inline __m128i round_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  return _mm256_castsi256_si128(words);
}
inline __m128i round_f16(__m256 value) { return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }

inline void store8(float* out, __m256 value) { _mm256_storeu_ps(out, value); }
inline void store8(bf16* out, __m256 value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out), round_bf16(value)); }
inline void store8(f16* out, __m256 value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out), round_f16(value)); }

// A vector of eight floats. Each instruction set has a Vec with these members, so that one source of a kernel serves
// all instruction sets.
struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec broadcast(float value) { return {_mm256_set1_ps(value)}; }
  static Vec load(const float* x) { return {_mm256_loadu_ps(x)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  Vec reciprocal() const { return {_mm256_div_ps(_mm256_set1_ps(1.0f), v)}; }
  // min and max return b if a or b is NaN.
  static Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  // Returns b in the lanes where a is greater than 0, and c in all other lanes.
  static Vec positive(Vec a, Vec b, Vec c) {
    return {_mm256_blendv_ps(c.v, b.v, _mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_GT_OQ))};
  }
  // Returns a in the lanes i for which bit i of `bits` is set, and b in all other lanes.
  static Vec where(uint32_t bits, Vec a, Vec b) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(bits)), lane);
    return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)))};
  }
  Vec abs() const { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)}; }
  Vec round() const { return {_mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // Returns a * 2^whole for integers `whole` from -126 to 127.
  static Vec times_exp2(Vec a, Vec whole) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(whole.v), _mm256_set1_epi32(127));
    return mul(a, {_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23))});
  }
  float sum() const {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  // Returns a vector whose lane i is the sum of all lanes of the vector `of[i]`.
  static Vec sums_of(const Vec (&of)[kWidth]) {
    __m256 four[2];
    for (int i = 0; i < 2; ++i)
      four[i] = _mm256_hadd_ps(_mm256_hadd_ps(of[4 * i].v, of[4 * i + 1].v),
                               _mm256_hadd_ps(of[4 * i + 2].v, of[4 * i + 3].v));
    return {
        _mm256_add_ps(_mm256_permute2f128_ps(four[0], four[1], 0x20), _mm256_permute2f128_ps(four[0], four[1], 0x31))};
  }
  float largest() const {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  void store(float* x) const { _mm256_storeu_ps(x, v); }

  // Loads kWidth values of any element type as floats. With `count`, only the first `count` values are loaded, and the
  // remaining lanes are 0.
  template <typename T>
  static Vec load_as(const T* x) {
    return {load8(x)};
  }
  static Vec load_as(const float* x, int64_t count) { return {_mm256_maskload_ps(x, first_lanes(count))}; }
  template <typename T>
  static Vec load_as(const T* x, int64_t count) {
    T lanes[kWidth] = {};  // AVX2 has no masked load of 16-bit values
    memcpy(lanes, x, static_cast<size_t>(count) * sizeof(T));
    return {load8(lanes)};
  }
  template <typename T>
  void store_as(T* x) const {
    store8(x, v);
  }
  void store_as(float* x, int64_t count) const { _mm256_maskstore_ps(x, first_lanes(count), v); }
  template <typename T>
  void store_as(T* x, int64_t count) const {
    T lanes[kWidth];
    store8(lanes, v);
    memcpy(x, lanes, static_cast<size_t>(count) * sizeof(T));
  }
  // Returns the lanes rounded to the element type T, as floats.
  template <typename T>
  Vec rounded() const;
  // Returns the first `count` lanes, and zeros in the remaining lanes.
  Vec first(int64_t count) const { return {_mm256_and_ps(_mm256_castsi256_ps(first_lanes(count)), v)}; }

 private:
  static __m256i first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

template <>
inline Vec Vec::rounded<float>() const {
  return *this;
}
template <>
inline Vec Vec::rounded<bf16>() const {
  const __m128i bits = round_bf16(v);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
template <>
inline Vec Vec::rounded<f16>() const {
  return {_mm256_cvtph_ps(round_f16(v))};
}

// A vector of four 64-bit lanes for Philox (see philox_impl.h); the low half of each lane is a 32-bit word.
struct Lanes {
  static constexpr int kWidth = 4;
  __m256i v;
  static Lanes broadcast(uint64_t value) { return {_mm256_set1_epi64x(static_cast<int64_t>(value))}; }
  // Returns the Philox counters first to first + 3, in an order that store_words turns into the order of the counters.
  static Lanes counters(uint64_t first) {
    return {_mm256_add_epi64(broadcast(first).v, _mm256_setr_epi64x(0, 2, 1, 3))};
  }
  // Loads four Philox counters from memory, and returns them in the order of counters().
  static Lanes listed(const uint64_t* counters) {
    return {_mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(counters)), 0xD8)};
  }
  static Lanes mul32(Lanes a, Lanes b) { return {_mm256_mul_epu32(a.v, b.v)}; }
  static Lanes xor3(Lanes a, Lanes b, Lanes c) { return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)}; }
  Lanes high() const { return {_mm256_srli_epi64(v, 32)}; }
  static void store_words(Lanes w0, Lanes w1, Lanes w2, Lanes w3, uint16_t* out) {
    const __m256i first = _mm256_blend_epi32(w0.v, _mm256_slli_epi64(w1.v, 32), 0xAA);
    const __m256i second = _mm256_blend_epi32(w2.v, _mm256_slli_epi64(w3.v, 32), 0xAA);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(first, second));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_unpackhi_epi64(first, second));
  }
};

// Replaces values[i] by values[i] * scale if draws[i] >= threshold, otherwise by 0.
inline void apply_dropout(const Dropout& dropout, const uint16_t* draws, int64_t count, float* values) {
  const __m256i below = _mm256_set1_epi32(static_cast<int32_t>(dropout.threshold) - 1);
  const __m256 scale = _mm256_set1_ps(dropout.scale);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256i draw = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(draws + i)));
    const __m256 keep = _mm256_castsi256_ps(_mm256_cmpgt_epi32(draw, below));
    _mm256_storeu_ps(values + i, _mm256_and_ps(keep, _mm256_mul_ps(_mm256_loadu_ps(values + i), scale)));
  }
  for (; i < count; ++i) values[i] = draws[i] >= dropout.threshold ? values[i] * dropout.scale : 0.0f;
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
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, load8(x + i));
  for (; i < count; ++i) out[i] = to_float(x[i]);
}

template <typename T>
inline void narrow(const float* x, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) store8(out + i, _mm256_loadu_ps(x + i));
  for (; i < count; ++i) out[i] = from_float<T>(x[i]);
}

}  // namespace
}  // namespace peft_ext
