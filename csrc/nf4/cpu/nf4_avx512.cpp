// NF4 with AVX-512 F/BW/DQ/VL. See nf4_kernels.h for the contract.
//
// Quantize: 16 values at a time find their code by a binary search whose four pivots come from a register table.
// Dequantize: a block's 16 products code * absmax are made and rounded once; then two codes a lane look up
// bfloat16/float16 words (vpermw), or one code a lane looks up float32 (vpermps). Same bits as a product per element.
// Both read and write memory once: 0.53 bytes of NF4 against 2 or 4 bytes an element.
#if defined(__x86_64__)
#include "cpu/target_avx512.h"
// The target must be set before these headers are read.
#include "cpu/simd_avx512.h"
#include "nf4/cpu/nf4_block.h"
#include "nf4/cpu/nf4_kernels.h"

namespace peft_ext {
namespace {

// Scaled values -> codes in the low byte of each 32-bit lane. `!(threshold >= value)` so that a NaN gets code 15.
inline __m512i encode16(__m512 scaled, __m512 thresholds) {
  const auto above = [&](__m512i index) {
    return _mm512_cmp_ps_mask(_mm512_permutexvar_ps(index, thresholds), scaled, _CMP_NGE_UQ);
  };
  const __m512i one = _mm512_set1_epi32(1);
  __m512i code = _mm512_maskz_set1_epi32(above(_mm512_set1_epi32(7)), 8);
  code = _mm512_mask_add_epi32(code, above(_mm512_add_epi32(code, _mm512_set1_epi32(3))), code, _mm512_set1_epi32(4));
  code = _mm512_mask_add_epi32(code, above(_mm512_add_epi32(code, one)), code, _mm512_set1_epi32(2));
  return _mm512_mask_add_epi32(code, above(code), code, one);
}

// 16 codes -> 8 bytes: an even lane is the high nibble of the byte it shares with the next.
inline void store_codes(uint8_t* packed, __m512i codes) {
  const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(codes, 4), _mm512_srli_epi64(codes, 32));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi64_epi8(pairs));
}

struct Thresholds {
  alignas(64) float values[16] = {};  // the last is never a pivot

  constexpr Thresholds() {
    for (int i = 0; i < 15; ++i) values[i] = nf4_threshold(i);
  }
};
constexpr Thresholds kThresholds;

template <typename T>
inline float largest_of(const T* in, int64_t blocksize) {
  // The maximum of the sign-free bits, as integers: a NaN's are above infinity's, so it wins as in torch.amax.
  const __m512i sign_free = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < blocksize; i += 16)
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(load16(in + i)), sign_free));
  return bits_to_float(static_cast<uint32_t>(_mm512_reduce_max_epi32(most)));
}

template <typename T>
inline void encode(const T* in, int64_t blocksize, float inverse, uint8_t* packed) {
  const __m512 thresholds = _mm512_load_ps(kThresholds.values);
  for (int64_t i = 0; i < blocksize; i += 16) {
    const __m512 scaled = _mm512_mul_ps(load16(in + i), _mm512_set1_ps(inverse));
    store_codes(packed + i / 2, encode16(scaled, thresholds));
  }
}

// 16 bytes -> 32 elements. The index of an even word is the byte's high nibble, of an odd word its low one; vpermw
// reads five bits, and the table holds the 16 values twice, so bit 4 does not matter.
inline void expand_words(const uint8_t* packed, __m512i table, void* out) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
}

// 8 bytes -> 16 elements, by the same trick on 32-bit lanes: vpermps reads four bits.
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

// One half of each of 256 floats: a word of 16 bits, 64 of which a vpermi2w looks up.
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

  // Of 32 codes, one a word.
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
  // Halves are put together within lanes of 128 bits: four codes of the first 16 and four of the others lie in each.
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
