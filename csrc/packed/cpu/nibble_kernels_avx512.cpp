// The kernels of nibble_kernels.h with AVX512-BF16.
//
// 64 bytes of W are 128 codes, read as 32 words of four codes each. The low bits of a word after shifts by 0, 4, 8 and
// 12 bits are the indices for four registers of weights. So no code has to move to a lane of its own; instead x is
// permuted once for all rows, to the order of the codes. vpermw looks table entries up, and vdpbf16ps multiplies and
// adds pairs in float32: lane l of a sum belongs to the words 2 l and 2 l + 1, that is, to block l / 4 of the four
// blocks of 32 columns.
#if defined(__x86_64__)
#include "cpu/target_avx512bf16.h"
// These headers must be included after the target pragma.
#include <immintrin.h>

#include "packed/cpu/format_traits.h"
#include "packed/cpu/nibble_kernels.h"
#include "weight/formats/list.h"

namespace peft_ext {
namespace {

// Returns the column, within 128 columns, of the code that lane `word` of register v finds.
int column_of(Nibbles nibbles, int v, int word) {
  switch (nibbles) {
    case Nibbles::kLowFirst:
      return 4 * word + v;
    case Nibbles::kHighFirst:
      return 4 * word + (v ^ 1);
    default:  // kHalves: the low nibbles of a block's 16 bytes are its first 16 columns
      return word / 8 * 32 + word % 8 * 2 + v / 2 + v % 2 * 16;
  }
}

template <typename F>
void order(const bf16* x, int64_t tokens, int64_t columns, bf16* ordered, float* sums) {
  const int64_t stride = ordered_columns(columns);
  uint8_t from[kNibbleColumns];
  for (int i = 0; i < kNibbleColumns; ++i) from[i] = static_cast<uint8_t>(column_of(F::kNibbles, i / 32, i % 32));
  const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < stride; j += kNibbleColumns) {
      bf16* out = ordered + t * stride + j;
      const bf16* in = x + t * columns + j;
      for (int i = 0; i < kNibbleColumns; ++i) out[i] = j + from[i] < columns ? in[from[i]] : bf16{0};
      __m512 total = _mm512_setzero_ps();
      for (int v = 0; v < 4; ++v)
        total = _mm512_dpbf16_ps(total, reinterpret_cast<__m512bh>(_mm512_loadu_si512(out + 32 * v)), ones);
      _mm512_storeu_ps(sums + (t * stride + j) / 8, total);
    }
}

// Loads the codes of `blocks` blocks of 32 columns, 1 to 4, and zeros after them.
template <typename F>
inline __m512i load_codes(const PackedView& w, int64_t row, int64_t column, int blocks) {
  if (F::kContiguous && blocks == 4) return _mm512_loadu_si512(F::codes32(w, row, column));
  const auto piece = [&](int i) {
    return i < blocks ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(F::codes32(w, row, column + 32 * i)))
                      : _mm_setzero_si128();
  };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(piece(0)), piece(1), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(piece(2)), piece(3), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

constexpr int64_t kScaleColumns = 4096;  // number of columns whose scales are decoded together
constexpr int kScalesTogether = kScaleColumns / 16;

// Multiplies the rows [n, n + kRows) with kTokens tokens.
template <typename F, int kTokens, int kRows>
inline void multiply_block(const PackedView& w, const bf16* x, const float* x_sums, int64_t n, float* y) {
  constexpr int kScales = F::kScaleColumns == 16 ? 8 : 4;  // number of scales of 128 columns
  const int64_t k = w.columns, stride = ordered_columns(k);
  const __m512 entries = _mm512_loadu_ps(F::table16());
  const __m512i table = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(entries, entries));
  alignas(64) int32_t lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = i * kScales / 16;
  const __m512i lane = _mm512_load_si512(lanes);
  alignas(64) float scale[kRows][kScalesTogether], add[kRows][kScalesTogether];
  __m512 sums[kRows][kTokens];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) sums[r][t] = _mm512_setzero_ps();
  for (int64_t start = 0; start < k; start += kScaleColumns) {
    const int64_t stop = min_i64(start + kScaleColumns, k), count = (stop - start) / F::kScaleColumns;
    for (int r = 0; r < kRows; ++r) {
      F::affine(w, n + r, start, count, scale[r], add[r]);
      for (int64_t i = count; i % kScales != 0; ++i) scale[r][i] = add[r][i] = 0.0f;
    }
    for (int64_t j = start; j < stop; j += kNibbleColumns) {
      const int blocks = static_cast<int>(min_i64(4, (stop - j) / 32));
      const int64_t at = (j - start) / F::kScaleColumns;
      __m512i words[kRows];
      __m512 fresh[kRows][kTokens];
      for (int r = 0; r < kRows; ++r) {
        words[r] = load_codes<F>(w, n + r, j, blocks);
        if (F::kContiguous)
          _mm_prefetch(reinterpret_cast<const char*>(F::codes32(w, n + r, j)) + kRows * k / 2, _MM_HINT_T1);
        for (int t = 0; t < kTokens; ++t) fresh[r][t] = _mm512_setzero_ps();
      }
      for (int v = 0; v < 4; ++v) {
        __m512bh values[kRows];
        for (int r = 0; r < kRows; ++r) {
          const __m512i index = v == 0 ? words[r] : _mm512_srli_epi16(words[r], 4 * v);
          values[r] = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(index, table));
        }
        for (int t = 0; t < kTokens; ++t) {
          const auto token = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + t * stride + j + 32 * v));
          for (int r = 0; r < kRows; ++r) fresh[r][t] = _mm512_dpbf16_ps(fresh[r][t], token, values[r]);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        const auto spread = [&](const float* of) {
          const __m512 held = kScales == 4 ? _mm512_castps128_ps512(_mm_loadu_ps(of + at))
                                           : _mm512_castps256_ps512(_mm256_loadu_ps(of + at));
          return _mm512_permutexvar_ps(lane, held);
        };
        const __m512 by = spread(scale[r]);
        for (int t = 0; t < kTokens; ++t) sums[r][t] = _mm512_fmadd_ps(fresh[r][t], by, sums[r][t]);
        if (!F::kAdds) continue;
        const __m512 plus = spread(add[r]);
        for (int t = 0; t < kTokens; ++t)
          sums[r][t] = _mm512_fmadd_ps(_mm512_loadu_ps(x_sums + (t * stride + j) / 8), plus, sums[r][t]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) y[t * w.rows + n + r] = _mm512_reduce_add_ps(sums[r][t]);
}

template <typename F, int kRows>
inline void multiply_rows(const PackedView& w, const bf16* ordered, const float* sums, int64_t tokens, float* y,
                          int64_t n) {
  const int64_t stride = ordered_columns(w.columns);
  for (int64_t t = 0; t < tokens;) {
    const bf16* x = ordered + t * stride;
    const float* x_sums = sums + t * stride / 8;
    float* out = y + t * w.rows;
    switch (tokens - t) {
      case 1:
        multiply_block<F, 1, kRows>(w, x, x_sums, n, out);
        t += 1;
        break;
      case 2:
        multiply_block<F, 2, kRows>(w, x, x_sums, n, out);
        t += 2;
        break;
      case 3:
        multiply_block<F, 3, kRows>(w, x, x_sums, n, out);
        t += 3;
        break;
      default:
        multiply_block<F, 4, kRows>(w, x, x_sums, n, out);
        t += 4;
    }
  }
}

template <typename F>
void multiply(const PackedView& w, const bf16* ordered, const float* sums, int64_t tokens, float* y, int64_t begin,
              int64_t end) {
  constexpr int kRows = 2;
  int64_t n = begin;
  for (; n + kRows <= end; n += kRows) multiply_rows<F, kRows>(w, ordered, sums, tokens, y, n);
  for (; n < end; ++n) multiply_rows<F, 1>(w, ordered, sums, tokens, y, n);
}

template <typename F>
NibbleKernels kernels_of() {
  if constexpr (HasNibbles<F>::kValue)
    return {F::has_nibbles, order<F>, multiply<F>};
  else
    return {nullptr, nullptr, nullptr};
}

}  // namespace

NibbleKernels nibble_kernels_avx512_bf16(int number) {
  switch (number) {
#define FORMAT(number, Format) \
  case number:                 \
    return kernels_of<Format>();
    PEFT_EXT_FORMATS(FORMAT)
#undef FORMAT
    default:
      return {nullptr, nullptr, nullptr};
  }
}

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
