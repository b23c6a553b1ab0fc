// The vector type Vec for AVX-512, with 16 float lanes, and dropout loops with AVX-512. Include this file after
// target_avx512.h.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "common/dtype.h"
#include "common/philox.h"

namespace peft_ext {
namespace {

inline __m512 load16(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 load16(const bf16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline __m512 load16(const f16* x) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }

// Rounds to bfloat16 by integer arithmetic, because vcvtneps2bf16 flushes subnormals to zero.
inline __m256i round_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(rounded);
}
inline __m256i round_f16(__m512 value) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }

inline void store16(float* out, __m512 value) { _mm512_storeu_ps(out, value); }
inline void store16(bf16* out, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), round_bf16(value));
}
inline void store16(f16* out, __m512 value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), round_f16(value)); }

// A vector of sixteen floats. Each instruction set has a Vec with these members, so that one source of a kernel serves
// all instruction sets.
struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }
  static Vec load(const float* x) { return {_mm512_loadu_ps(x)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  // Returns 1 / v for a normal finite v, accurate to an ulp and exact for v = 1, in about a third of a division's time.
  Vec reciprocal() const {
    const __m512 r = _mm512_rcp14_ps(v);
    return {_mm512_fmadd_ps(r, _mm512_fnmadd_ps(v, r, _mm512_set1_ps(1.0f)), r)};
  }
  // min and max return b if a or b is NaN.
  static Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  // Returns b in the lanes where a is greater than 0, and c in all other lanes.
  static Vec positive(Vec a, Vec b, Vec c) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GT_OQ), c.v, b.v)};
  }
  // Returns a in the lanes i for which bit i of `bits` is set, and b in all other lanes.
  static Vec where(uint32_t bits, Vec a, Vec b) {
    return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), b.v, a.v)};
  }
  Vec abs() const { return {_mm512_abs_ps(v)}; }
  Vec round() const { return {_mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // Returns a * 2^whole for integers `whole` from -126 to 127.
  static Vec times_exp2(Vec a, Vec whole) { return {_mm512_scalef_ps(a.v, whole.v)}; }
  float sum() const { return _mm512_reduce_add_ps(v); }
  // Returns a vector whose lane i is the sum of all lanes of the vector `of[i]`.
  static Vec sums_of(const Vec (&of)[kWidth]) {
    __m512 two[8], four[4];
    // In each 128-bit part of two[i], lanes 0 and 2 are sums of two lanes of `of[2 i]`, and lanes 1 and 3 are sums of
    // two lanes of `of[2 i + 1]`.
    for (int i = 0; i < 8; ++i) {
      const __m512 a = of[2 * i].v, b = of[2 * i + 1].v;
      two[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    // In each 128-bit part of four[i], lane j is the sum of four lanes of `of[4 i + j]`.
    for (int i = 0; i < 4; ++i) {
      const __m512 a = two[2 * i], b = two[2 * i + 1];
      four[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    const __m512 low =
        _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x44), _mm512_shuffle_f32x4(four[0], four[1], 0xee));
    const __m512 high =
        _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x44), _mm512_shuffle_f32x4(four[2], four[3], 0xee));
    return {_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd))};
  }
  float largest() const { return _mm512_reduce_max_ps(v); }
  void store(float* x) const { _mm512_storeu_ps(x, v); }

  // Loads kWidth values of any element type as floats. With `count`, only the first `count` values are loaded, and the
  // remaining lanes are 0.
  template <typename T>
  static Vec load_as(const T* x) {
    return {load16(x)};
  }
  static Vec load_as(const float* x, int64_t count) { return {_mm512_maskz_loadu_ps(first_lanes(count), x)}; }
  static Vec load_as(const bf16* x, int64_t count) {
    const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(count), x);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static Vec load_as(const f16* x, int64_t count) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), x))};
  }
  template <typename T>
  void store_as(T* x) const {
    store16(x, v);
  }
  void store_as(float* x, int64_t count) const { _mm512_mask_storeu_ps(x, first_lanes(count), v); }
  void store_as(bf16* x, int64_t count) const { _mm256_mask_storeu_epi16(x, first_lanes(count), round_bf16(v)); }
  void store_as(f16* x, int64_t count) const { _mm256_mask_storeu_epi16(x, first_lanes(count), round_f16(v)); }
  // Returns the lanes rounded to the element type T, as floats.
  template <typename T>
  Vec rounded() const;
  // Returns the first `count` lanes, and zeros in the remaining lanes.
  Vec first(int64_t count) const { return {_mm512_maskz_mov_ps(first_lanes(count), v)}; }

 private:
  static __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
};

template <>
inline Vec Vec::rounded<float>() const {
  return *this;
}
template <>
inline Vec Vec::rounded<bf16>() const {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(round_bf16(v)), 16))};
}
template <>
inline Vec Vec::rounded<f16>() const {
  return {_mm512_cvtph_ps(round_f16(v))};
}

// A vector of eight 64-bit lanes for Philox (see philox_impl.h); the low half of each lane is a 32-bit word.
struct Lanes {
  static constexpr int kWidth = 8;
  __m512i v;
  static Lanes broadcast(uint64_t value) { return {_mm512_set1_epi64(static_cast<int64_t>(value))}; }
  // Returns the Philox counters first to first + 7, in an order that store_words turns into the order of the counters.
  static Lanes counters(uint64_t first) {
    return {_mm512_add_epi64(broadcast(first).v, _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7))};
  }
  // Loads eight Philox counters from memory, and returns them in the order of counters().
  static Lanes listed(const uint64_t* counters) {
    return {_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), _mm512_loadu_si512(counters))};
  }
  static Lanes mul32(Lanes a, Lanes b) { return {_mm512_mul_epu32(a.v, b.v)}; }
  static Lanes xor3(Lanes a, Lanes b, Lanes c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }
  Lanes high() const { return {_mm512_srli_epi64(v, 32)}; }
  static void store_words(Lanes w0, Lanes w1, Lanes w2, Lanes w3, uint16_t* out) {
    const __m512i first = _mm512_mask_shuffle_epi32(w0.v, 0xAAAA, w1.v, _MM_PERM_CCAA);
    const __m512i second = _mm512_mask_shuffle_epi32(w2.v, 0xAAAA, w3.v, _MM_PERM_CCAA);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(first, second));
    _mm512_storeu_si512(out + 32, _mm512_unpackhi_epi64(first, second));
  }
};

// Replaces values[i] by values[i] * scale if draws[i] >= threshold, otherwise by 0.
inline void apply_dropout(const Dropout& dropout, const uint16_t* draws, int64_t count, float* values) {
  const __m512i threshold = _mm512_set1_epi32(static_cast<int32_t>(dropout.threshold));
  const __m512 scale = _mm512_set1_ps(dropout.scale);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 inside = count - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count - i)) - 1);
    const __m512i draw = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(draws + i)));
    const __mmask16 keep = _mm512_cmpge_epi32_mask(draw, threshold);
    const __m512 kept = _mm512_maskz_mul_ps(keep, _mm512_maskz_loadu_ps(inside, values + i), scale);
    _mm512_mask_storeu_ps(values + i, inside, kept);
  }
}

// Sets the 16-bit element out[i] to x[i] if dropout keeps element i, and to 0 otherwise. Dropout's scale is not
// applied.
inline void drop_words(const Dropout& dropout, const uint16_t* draws, int64_t count, const void* x, void* out) {
  const __m512i below = _mm512_set1_epi16(static_cast<int16_t>(dropout.threshold - 1));
  for (int64_t i = 0; i < count; i += 32) {
    const __mmask32 inside = count - i >= 32 ? 0xffffffffu : (1u << (count - i)) - 1;
    const __m512i draw = _mm512_maskz_loadu_epi16(inside, draws + i);
    const __mmask32 keep = dropout.threshold == 0 ? inside : _mm512_mask_cmpgt_epu16_mask(inside, draw, below);
    const __m512i kept = _mm512_maskz_loadu_epi16(keep, static_cast<const uint16_t*>(x) + i);
    _mm512_mask_storeu_epi16(static_cast<uint16_t*>(out) + i, inside, kept);
  }
}
inline void drop_values(const Dropout& dropout, const uint16_t* draws, int64_t count, const bf16* x, bf16* out) {
  drop_words(dropout, draws, count, x, out);
}
inline void drop_values(const Dropout& dropout, const uint16_t* draws, int64_t count, const f16* x, f16* out) {
  drop_words(dropout, draws, count, x, out);
}

// Writes the dropout mask as bits to ceil(count / 32) words: bit i is draws[i] >= threshold.
inline void keep_bits(const Dropout& dropout, const uint16_t* draws, int64_t count, uint32_t* words) {
  // A threshold of 65536 drops every element, because no draw is greater than `below` = 65535.
  const __m512i below = _mm512_set1_epi16(static_cast<int16_t>(dropout.threshold - 1));
  for (int64_t i = 0; i < count; i += 32) {
    const __mmask32 inside = count - i >= 32 ? 0xffffffffu : (1u << (count - i)) - 1;
    const __m512i draw = _mm512_maskz_loadu_epi16(inside, draws + i);
    words[i / 32] = dropout.threshold == 0 ? inside : _mm512_mask_cmpgt_epu16_mask(inside, draw, below);
  }
}

template <typename T>
inline void widen(const T* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) _mm512_storeu_ps(out + i, load16(x + i));
  for (; i < count; ++i) out[i] = to_float(x[i]);
}

template <typename T>
inline void narrow(const float* x, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store16(out + i, _mm512_loadu_ps(x + i));
  for (; i < count; ++i) out[i] = from_float<T>(x[i]);
}

}  // namespace
}  // namespace peft_ext
