// The products of few bfloat16 tokens and a weight of 8-bit codes, with AVX512-BF16: the contract of nibble_kernels.h
// for FP8, int8 and GGUF's Q8_0. A code is exact in bfloat16: 32 codes are converted to 32 words, and vdpbf16ps
// multiplies and adds pairs in float32. The sum of 32 columns, which share a scale, is multiplied by the scale.
#if defined(__x86_64__)
#include "cpu/target_avx512bf16.h"
// These headers must be included after the target pragma.
#include <immintrin.h>

#include "packed/cpu/nibble_kernels.h"
#include "weight/formats/list.h"

namespace peft_ext {
namespace {

constexpr int64_t kBlock = 32;  // columns that share a scale

inline __m256i load32(const uint8_t* codes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)); }

// Returns 32 signed bytes in bfloat16.
inline __m512bh signed_words(__m256i codes) {
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
  return _mm512_cvtne2ps_pbh(high, low);
}

struct Fp8Codes {
  static bool accepts(const PackedView& w) { return Fp8::runs(w); }
  // From magnitude 8 on, the bits of a code are the bits of a bfloat16, apart from the bias of the exponent. The eight
  // smaller magnitudes are multiples of 2^-9, and are looked up: vdpbf16ps would take a subnormal for 0.
  static __m512bh words(const PackedView& w, int64_t row, int64_t column) {
    const __m512i codes =
        _mm512_cvtepu8_epi16(load32(static_cast<const uint8_t*>(w.part[0]) + row * w.columns + column));
    const __m512i magnitude = _mm512_and_si512(codes, _mm512_set1_epi16(0x7f));
    const __m512i small =
        _mm512_broadcast_i32x4(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    __m512i words = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    words = _mm512_mask_permutexvar_epi16(words, _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8)), magnitude,
                                          small);
    words = _mm512_mask_mov_epi16(words, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f)),
                                  _mm512_set1_epi16(0x7fc0));
    const __m512i sign = _mm512_slli_epi16(_mm512_andnot_si512(_mm512_set1_epi16(0x7f), codes), 8);
    return reinterpret_cast<__m512bh>(_mm512_or_si512(words, sign));
  }
  static void scales(const PackedView& w, int64_t row, int64_t column, int64_t count, float* scale) {
    const int shift = Fp8::column_shift(w);
    const int64_t together =
        shift - 5 >= 40 ? count : int64_t{1} << (shift - 5);  // blocks of 32 columns with one scale
    for (int64_t i = 0; i < count;) {
      const float value = Fp8::scale(w, row, column + i * kBlock);
      const int64_t stop = min_i64(count, ((column / kBlock + i) / together + 1) * together - column / kBlock);
      for (; i < stop; ++i) scale[i] = value;
    }
  }
};

struct IntCodes {
  static bool accepts(const PackedView& w) {
    return code_bits(w.option) == 8 && w.part[2] == nullptr && w.columns % kBlock == 0 &&
           (w.group == 0 ? w.part[3] == nullptr : one_group_in_32(w, w.part[3]));
  }
  static __m512bh words(const PackedView& w, int64_t row, int64_t column) {
    const __m256i codes = load32(static_cast<const uint8_t*>(w.part[0]) + row * w.columns + column);
    return signed_words(IntRows::is_plain(w) ? codes : _mm256_xor_si256(codes, _mm256_set1_epi8(-128)));
  }
  static void scales(const PackedView& w, int64_t row, int64_t column, int64_t count, float* scale) {
    const int64_t groups = groups_of(w), first = IntRows::has_one_scale(w) ? 0 : row * groups;
    for (int64_t i = 0; i < count; ++i)
      scale[i] = scale_value(w.part[1], scale_type(w.option), first + group_in_order(w, column + i * kBlock));
  }
};

struct Q80Codes {
  static constexpr int64_t kBytes = BlockQ8_0::kBytes;
  static bool accepts(const PackedView&) { return true; }
  static const uint8_t* block(const PackedView& w, int64_t row, int64_t column) {
    return static_cast<const uint8_t*>(w.part[0]) + (row * w.columns + column) / kBlock * kBytes;
  }
  static __m512bh words(const PackedView& w, int64_t row, int64_t column) {
    return signed_words(load32(block(w, row, column) + 2));
  }
  static void scales(const PackedView& w, int64_t row, int64_t column, int64_t count, float* scale) {
    const uint8_t* b = block(w, row, column);
    for (int64_t i = 0; i < count; ++i) scale[i] = BlockQ8_0::scale(b + i * kBytes, 0);
  }
};

// Copies x, zero-padded to whole groups of kNibbleColumns.
void order(const bf16* x, int64_t tokens, int64_t columns, bf16* ordered, float*) {
  const int64_t stride = ordered_columns(columns);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < stride; ++j) ordered[t * stride + j] = j < columns ? x[t * columns + j] : bf16{0};
}

constexpr int64_t kColumnsTogether = 4096;  // columns whose scales are decoded together

// Multiplies the rows [n, n + kRows) with kTokens tokens.
template <typename Codes, int kTokens, int kRows>
inline void multiply_block(const PackedView& w, const bf16* x, int64_t n, float* y) {
  const int64_t k = w.columns, stride = ordered_columns(k);
  float scale[kRows][kColumnsTogether / kBlock];
  __m512 sums[kRows][kTokens];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) sums[r][t] = _mm512_setzero_ps();
  for (int64_t start = 0; start < k; start += kColumnsTogether) {
    const int64_t count = min_i64(kColumnsTogether, k - start) / kBlock;
    for (int r = 0; r < kRows; ++r) Codes::scales(w, n + r, start, count, scale[r]);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t j = start + i * kBlock;
      __m512bh words[kRows];
      for (int r = 0; r < kRows; ++r) {
        words[r] = Codes::words(w, n + r, j);
        _mm_prefetch(static_cast<const char*>(w.part[0]) + (n + r + kRows) * k + j, _MM_HINT_T1);
      }
      for (int t = 0; t < kTokens; ++t) {
        const auto token = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + t * stride + j));
        for (int r = 0; r < kRows; ++r) {
          const __m512 fresh = _mm512_dpbf16_ps(_mm512_setzero_ps(), token, words[r]);
          sums[r][t] = _mm512_fmadd_ps(fresh, _mm512_set1_ps(scale[r][i]), sums[r][t]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) y[t * w.rows + n + r] = _mm512_reduce_add_ps(sums[r][t]);
}

template <typename Codes, int kRows>
inline void multiply_rows(const PackedView& w, const bf16* x, int64_t tokens, float* y, int64_t n) {
  const int64_t stride = ordered_columns(w.columns);
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) multiply_block<Codes, 4, kRows>(w, x + t * stride, n, y + t * w.rows);
  for (; t + 2 <= tokens; t += 2) multiply_block<Codes, 2, kRows>(w, x + t * stride, n, y + t * w.rows);
  for (; t < tokens; ++t) multiply_block<Codes, 1, kRows>(w, x + t * stride, n, y + t * w.rows);
}

template <typename Codes>
void multiply(const PackedView& w, const bf16* ordered, const float*, int64_t tokens, float* y, int64_t begin,
              int64_t end) {
  constexpr int kRows = 4;
  int64_t n = begin;
  for (; n + kRows <= end; n += kRows) multiply_rows<Codes, kRows>(w, ordered, tokens, y, n);
  for (; n < end; ++n) multiply_rows<Codes, 1>(w, ordered, tokens, y, n);
}

}  // namespace

NibbleKernels byte_kernels_avx512_bf16(int number) {
  switch (number) {
    case 4:
      return {Fp8Codes::accepts, order, multiply<Fp8Codes>};
    case 5:
      return {IntCodes::accepts, order, multiply<IntCodes>};
    case 72:
      return {Q80Codes::accepts, order, multiply<Q80Codes>};
    default:
      return {nullptr, nullptr, nullptr};
  }
}

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
