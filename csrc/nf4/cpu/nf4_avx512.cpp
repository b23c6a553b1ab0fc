// The NF4 kernels of nf4_kernels.h with AVX-512 F/BW/DQ/VL.
//
// Quantize: for 16 values at a time, lookups in register tables find the threshold that decides each value's code.
// Dequantize: the kernel computes and rounds the 16 products code * absmax of a block once, and then looks each element
// up: bfloat16 and float16 words with two codes per 32-bit lane (vpermw), float32 values with one code per lane
// (vpermps). The elements have the same bits as if the product code * absmax were computed for each element alone.
// Quantize and dequantize move each element between memory and the cache once: half a byte as an NF4 code, 2 bytes in a
// 16-bit dtype or 4 bytes in float32, and the block's scale.
#if defined(__x86_64__)
#include "cpu/target_avx512.h"
// The headers below must be included after the target pragma.
#include "cpu/simd_avx512.h"
#include "nf4/cpu/nf4_block.h"
#include "nf4/cpu/nf4_kernels.h"

namespace peft_ext {
namespace {

// Divides the scaled values in [-1, 1] into bins; no bin contains two thresholds. below[bin] is the number of
// thresholds below the bin, and bound[bin] is the threshold within the bin, or infinity if the bin has no threshold.
// The code of a value is below[bin], plus one if the value is above bound[bin]. The lowest five bits of the float32
// number value * kPerUnit + kZero are the bin.
struct Bins {
  static constexpr float kPerUnit = 14.6f, kZero = 12582912.0f + 16.0f;  // floats near 1.5 * 2^23 are integers
  alignas(64) float bound[32] = {};
  alignas(64) int32_t below[32] = {};

  constexpr Bins() {
    int next = 0;
    for (int bin = 0; bin < 32; ++bin) {
      const bool holds = next < 15 && static_cast<float>(bin - 16) + 0.5f > nf4_threshold(next) * kPerUnit;
      bound[bin] = holds ? nf4_threshold(next) : __builtin_inff();
      below[bin] = next;
      next += holds;
    }
  }

  // Returns whether each threshold lies in a bin, so far from the bin's edges that rounding a value cannot matter.
  constexpr bool are_sound() const {
    for (int bin = 0; bin < 32; ++bin) {
      const float off = bound[bin] * kPerUnit - static_cast<float>(bin - 16);
      if (bound[bin] < 1.0f && !(off > -0.49f && off < 0.49f)) return false;
    }
    return below[31] == 15;
  }
};
constexpr Bins kBins;
static_assert(kBins.are_sound());

// Computes the NF4 codes of scaled values that are not NaN, one value per 32-bit lane. Each code is multiplied by the
// integer `step`.
struct Encoder {
  __m512 bounds[2];
  __m512i below[2], step;

  explicit Encoder(int by) : step(_mm512_set1_epi32(by)) {
    for (int half = 0; half < 2; ++half) {
      bounds[half] = _mm512_load_ps(kBins.bound + 16 * half);
      below[half] = _mm512_mullo_epi32(_mm512_load_si512(kBins.below + 16 * half), step);
    }
  }

  __m512i operator()(__m512 scaled) const {
    const __m512i bin =
        _mm512_castps_si512(_mm512_fmadd_ps(scaled, _mm512_set1_ps(Bins::kPerUnit), _mm512_set1_ps(Bins::kZero)));
    const __mmask16 above = _mm512_cmp_ps_mask(_mm512_permutex2var_ps(bounds[0], bin, bounds[1]), scaled, _CMP_LT_OQ);
    const __m512i code = _mm512_permutex2var_epi32(below[0], bin, below[1]);
    return _mm512_mask_add_epi32(code, above, code, step);
  }
};

// Packs 16 codes into 8 bytes. The code of an even lane becomes the high nibble of the byte that the even lane shares
// with the next lane.
inline void store_codes(uint8_t* packed, __m512i codes) {
  const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(codes, 4), _mm512_srli_epi64(codes, 32));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi64_epi8(pairs));
}

// Returns the largest magnitude, or NaN if a value is NaN, as in torch.amax. Magnitudes are compared as integers, and
// the bits of a NaN are greater than the bits of infinity.
inline float largest_of(const float* in, int64_t blocksize) {
  const __m512i sign_free = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < blocksize; i += 16)
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_loadu_si512(in + i), sign_free));
  return bits_to_float(static_cast<uint32_t>(_mm512_reduce_max_epi32(most)));
}
inline uint16_t largest_word_of(const void* in, int64_t blocksize) {
  const auto* words = static_cast<const uint16_t*>(in);
  const __m512i sign_free = _mm512_set1_epi16(0x7fff);
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < blocksize; i += 32)
    most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_loadu_si512(words + i), sign_free));
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
  const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const __m128i inverted = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
  return static_cast<uint16_t>(~_mm_cvtsi128_si32(inverted));
}
inline float largest_of(const bf16* in, int64_t blocksize) {
  return bits_to_float(static_cast<uint32_t>(largest_word_of(in, blocksize)) << 16);
}
inline float largest_of(const f16* in, int64_t blocksize) {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(largest_word_of(in, blocksize))));
}

// If `inverse` is 0 or NaN, because the block contains an infinity or a NaN, encoded_unbounded encodes the block and
// returns true. For a block of finite values, encoded_unbounded encodes nothing and returns false. If `inverse` is 0,
// each finite value becomes 0, and infinity becomes NaN, which has code 15.
template <typename T>
inline bool encoded_unbounded(const T* in, int64_t blocksize, float inverse, uint8_t* packed) {
  if (inverse > 0.0f) return false;
  encode_block(in, blocksize, [&](float value) { return value * inverse; }, packed);
  return true;
}

template <typename T>
inline void encode(const T* in, int64_t blocksize, float inverse, uint8_t* packed) {
  if (encoded_unbounded(in, blocksize, inverse, packed)) return;
  const Encoder encoder(1);
  for (int64_t i = 0; i < blocksize; i += 16)
    store_codes(packed + i / 2, encoder(_mm512_mul_ps(load16(in + i), _mm512_set1_ps(inverse))));
}
// Encodes a block of bfloat16 values to NF4. Each 32-bit lane of a register holds two values, and the code of the first
// value becomes the high nibble.
inline void encode(const bf16* in, int64_t blocksize, float inverse, uint8_t* packed) {
  if (encoded_unbounded(in, blocksize, inverse, packed)) return;
  const Encoder high(16), low(1);
  const __m512i upper_half = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
  const auto scaled = [&](__m512i bits) { return _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(inverse)); };
  for (int64_t i = 0; i < blocksize; i += 32) {
    const __m512i words = _mm512_loadu_si512(in + i);
    const __m512i codes =
        _mm512_or_si512(high(scaled(_mm512_slli_epi32(words, 16))), low(scaled(_mm512_and_si512(words, upper_half))));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), _mm512_cvtepi32_epi8(codes));
  }
}

// Looks up the 16-bit elements of the 32 codes in 16 bytes, and writes these elements to `out`. The index of an even
// word is the byte's high nibble, and the index of an odd word is the low nibble. vpermw reads five bits of an index,
// but the table holds the 16 values twice, so that bit 4 has no effect.
inline void expand_words(const uint8_t* packed, __m512i table, void* out) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
}

// Returns the 32-bit elements of the 16 codes in 8 bytes, looked up as in expand_words. vpermps reads only four bits of
// an index.
inline __m512 expand_floats(const uint8_t* packed, __m512 table) {
  const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
  const __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
  return _mm512_permutexvar_ps(index, table);
}

inline __m512 products_of(float scale) { return _mm512_mul_ps(_mm512_loadu_ps(kNf4Code), _mm512_set1_ps(scale)); }

inline void expand(const uint8_t* packed, float scale, int64_t count, float* out) {
  const __m512 table = products_of(scale);
  for (int64_t i = 0; i < count; i += 16) _mm512_storeu_ps(out + i, expand_floats(packed + i / 2, table));
}
inline void expand(const uint8_t* packed, float scale, int64_t count, bf16* out) {
  const __m512i table = _mm512_broadcast_i64x4(round_bf16(products_of(scale)));
  for (int64_t i = 0; i < count; i += 32) expand_words(packed + i / 2, table, out + i);
}
inline void expand(const uint8_t* packed, float scale, int64_t count, f16* out) {
  const __m512i table = _mm512_broadcast_i64x4(round_f16(products_of(scale)));
  for (int64_t i = 0; i < count; i += 32) expand_words(packed + i / 2, table, out + i);
}

// A table of the low halves, or of the high halves, of 256 floats, as 16-bit words. One vpermi2w looks 32 codes up in a
// table of 64 of these words, and four vpermi2w cover all 256 words.
struct ScaleHalves {
  __m512i words[8];

  ScaleHalves(const float* code, int half) {
    for (int i = 0; i < 8; ++i) {
      const auto half_of = [&](int at) {
        const __m512i bits = _mm512_loadu_si512(code + at);
        return _mm512_cvtepi32_epi16(half == 0 ? bits : _mm512_srli_epi32(bits, 16));
      };
      words[i] = _mm512_inserti64x4(_mm512_castsi256_si512(half_of(32 * i)), half_of(32 * i + 16), 1);
    }
  }

  // Returns the halves of the floats for 32 codes. `codes` has one code per 16-bit word.
  __m512i at(__m512i codes) const {
    const __mmask32 second = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(64));
    const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(128));
    const auto among = [&](int i) {
      return _mm512_mask_mov_epi16(_mm512_permutex2var_epi16(words[i], codes, words[i + 1]), second,
                                   _mm512_permutex2var_epi16(words[i + 2], codes, words[i + 3]));
    };
    return _mm512_mask_mov_epi16(among(0), upper, among(4));
  }
};

void decode_scales(const Nf4Scales& scales, int64_t begin, int64_t end, float* out) {
  const __m512 offset = _mm512_set1_ps(scales.offset);
  const ScaleHalves low(scales.code, 0), high(scales.code, 1);
  // The unpack instructions join the low and the high halves of the scales only within 128-bit lanes. Therefore the
  // permutation `lanes` gives each lane four of the first 16 codes and four of the last 16 codes.
  const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t i = begin;
  while (i < end) {
    const int64_t stop = min_i64((i / kNestedBlock + 1) * kNestedBlock, end);
    const __m512 group = _mm512_set1_ps(scales.absmax[i / kNestedBlock]);
    const auto finish = [&](__m512i bits, int64_t at) {
      _mm512_storeu_ps(out + (at - begin), _mm512_add_ps(_mm512_mul_ps(_mm512_castsi512_ps(bits), group), offset));
    };
    for (; i + 32 <= stop; i += 32) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales.codes + i));
      const __m512i codes = _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(bytes, lanes));
      const __m512i lower = low.at(codes), upper = high.at(codes);
      finish(_mm512_unpacklo_epi16(lower, upper), i);
      finish(_mm512_unpackhi_epi16(lower, upper), i + 16);
    }
    for (; i < stop; ++i) out[i - begin] = decode_scale(scales, i);
  }
}

struct Table {
  __m512 values;
};

inline Table make_table(float absmax, DType dtype) {
  const __m512 products = _mm512_mul_ps(_mm512_loadu_ps(kNf4Code), _mm512_set1_ps(absmax));
  if (dtype == DType::kBF16)
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(round_bf16(products)), 16))};
  if (dtype == DType::kF16) return {_mm512_cvtph_ps(round_f16(products))};
  return {products};
}

inline void decode(const uint8_t* packed, const Table& table, Vec* w) {
  for (int v = 0; v < 4; ++v) w[v].v = expand_floats(packed + 8 * v, table.values);
}

}  // namespace
}  // namespace peft_ext

#include "nf4/cpu/nf4_blocks_impl.h"
#include "nf4/cpu/nf4_skinny_impl.h"

namespace peft_ext {

const Nf4Kernels kNf4KernelsAvx512 = {quantize, dequantize, skinny, 8, decode_scales};

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
