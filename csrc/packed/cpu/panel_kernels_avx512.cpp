// The kernels of few_tokens_kernels.h for GPTQ and AWQ, which store W transposed, with AVX512-BF16.
//
// For consecutive rows n of W, the words of codes are neighbours in memory. The kernels read W in bands of up to 128
// columns k, and a band in panels of kRows rows. Each lane of a register of sums belongs to one row of W. A dword with
// x of two columns is broadcast to all lanes, and vpermw looks the codes' numbers up, as in row_products_avx512.h.
// The columns of a band share one scale and one zero point per row. After a band, y += scale * sum - zero * scale *
// (sum of x). The rows of a panel belong to one thread, so that the order of a sum does not depend on the number of
// threads.
#if defined(__x86_64__)
#include "cpu/target_avx512bf16.h"
// The headers below must be included after the target pragma.
#include <immintrin.h>

#include "packed/cpu/row_products_avx512.h"
#include "packed/cpu/row_scales_avx512.h"
#include "weight/formats/list.h"

namespace peft_ext {
namespace {

// Returns the number of columns of a band. With codes of 4 bits and up to 32,768 rows, two bands of W have at most 1
// MiB, which fits in the L2 cache. The number of columns of a band depends on W alone, so that sums are equal for every
// number of threads.
inline int64_t band_columns(const PackedView& w) { return w.rows <= 8192 ? 128 : w.rows <= 16384 ? 64 : 32; }

// Returns a mask of the first `count` of 16 lanes.
inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

// Prefetches the words of the next band into the L2 cache, in the order of memory: one cache line for each cache line
// that a kernel reads. The cache lines of one panel are far apart in memory.
class Ahead {
 public:
  Ahead(const uint32_t* row, int64_t stride, int64_t lines) : row_(row), stride_(stride), lines_(lines) {}
  void fetch() {
    _mm_prefetch(reinterpret_cast<const char*>(row_ + 16 * line_), _MM_HINT_T1);
    if (++line_ < lines_) return;
    line_ = 0;
    row_ += stride_;
  }

 private:
  const uint32_t* row_;
  // stride_: number of words between two rows; lines_: number of cache lines of a row; line_: next line to prefetch
  int64_t stride_, lines_, line_ = 0;
};

// clear and copy: a kernel adds up in a local array of sums, which stays in registers, and copies the array to `out` at
// the end.
template <int kSums, int kTokens>
inline void clear(__m512 (&sums)[kSums][kTokens]) {
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i)
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sums[i][t] = _mm512_setzero_ps();
}
template <int kSums, int kTokens>
inline void copy(const __m512 (&sums)[kSums][kTokens], __m512 (&out)[kSums][kTokens]) {
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i)
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) out[i][t] = sums[i][t];
}

// The constants that GptqPanel and AwqPanel share. The function `order` of row_products_avx512.h reads these constants.
// `order` writes one sum of x for each 32 columns.
struct PanelStep {
  static constexpr int kColumns = 32, kAddColumns = 32;
  static constexpr AddsAt kAdds = AddsAt::kInChunk;
};

// GptqPanel: a register holds a word of codes for each of 16 rows; a word has the codes of 8 columns (codes of 4 bits)
// or 4 columns (codes of 8 bits). A dword of x holds the two columns whose codes are at the same place in the lower and
// in the upper half of a word.
template <int kBits>
struct GptqPanel : PanelStep {
  static constexpr int kRows = 64, kSums = 4, kMostTokens = 4, kCodes = 32 / kBits, kLineRows = 16;
  static int column_of(int, int word) { return word / kCodes * kCodes + word % kCodes / 2 + word % 2 * (kCodes / 2); }
  static bool accepts(const PackedView& w) {
    return code_bits(w.option) == kBits && w.columns % 32 == 0 && one_group_in_32(w, w.part[3]);
  }
  static int64_t units(const PackedView& w) { return ceil_div(w.rows, kRows); }

  // Returns the address of the words of column k, a multiple of kCodes, from row n on.
  static const uint32_t* words(const PackedView& w, int64_t k, int64_t n) {
    return static_cast<const uint32_t*>(w.part[0]) + k / kCodes * w.rows + n;
  }

  // Computes the sums of the products of x with the codes of a panel of W over the columns [begin, end). multiply also
  // prefetches `next`, the words that are read after these columns.
  template <int kTokens>
  static void multiply(const PackedView& w, const uint32_t* const* x, int64_t begin, int64_t end, int64_t n,
                       const uint32_t* next, Ahead* ahead, __m512 (&out)[kSums][kTokens]) {
    __m512 sums[kSums][kTokens];
    clear(sums);
    const uint32_t* from = words(w, begin, n);
    __mmask16 masks[kSums];
    for (int i = 0; i < kSums; ++i) masks[i] = first_lanes(w.rows - n - 16 * i);
    for (int64_t k = begin; k < end; k += kCodes, from += w.rows, next += w.rows) {
      __m512i held[kSums];
      for (int i = 0; i < kSums; ++i) {
        held[i] = _mm512_maskz_loadu_epi32(masks[i], from + 16 * i);
        _mm_prefetch(reinterpret_cast<const char*>(next + 16 * i), _MM_HINT_T0);
        if (ahead) ahead->fetch();
      }
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        __m512bh tokens[kTokens];
        for (int t = 0; t < kTokens; ++t)
          tokens[t] = reinterpret_cast<__m512bh>(
              _mm512_set1_epi32(static_cast<int>(x[t][k / 2 + (kBits == 4 ? part : part / 2)])));
        const Words& numbers = kBits == 8 && part % 2 == 1 ? kUnsignedHighNibbles : kLowNibbles;
        for (int i = 0; i < kSums; ++i) {
          const __m512bh of_rows = looked_up(at_nibble(held[i], part), numbers);
          for (int t = 0; t < kTokens; ++t) sums[i][t] = _mm512_dpbf16_ps(sums[i][t], tokens[t], of_rows);
        }
      }
    }
    copy(sums, out);
  }
  // Orders the sums by rows; the sums of GPTQ have this order already.
  static void arrange(__m512 (&)[kSums]) {}

  // Returns the zero points of the rows n to n + 15, n a multiple of 16.
  static __m512i zeros(const PackedView& w, int64_t group, int64_t n) {
    const uint32_t ones = format_flags(w.option) & Gptq::kV1 ? 0xffffffffu / ((1u << kBits) - 1) : 0u;
    const int64_t count = words_of(w.rows, kBits), at = n / kCodes;
    const uint32_t* from = static_cast<const uint32_t*>(w.part[2]) + group * count + at;
    const __m512i held = _mm512_maskz_loadu_epi32(first_lanes(min_i64(count - at, 16 / kCodes)), from);
    static constexpr Lanes kWord = lanes_of_each([](int lane) { return lane / kCodes; });
    static constexpr Lanes kShift = lanes_of_each([](int lane) { return lane % kCodes * kBits; });
    const __m512i all = _mm512_add_epi32(_mm512_permutexvar_epi32(_mm512_load_si512(kWord.of), held),
                                         _mm512_set1_epi32(static_cast<int>(ones)));
    return _mm512_and_si512(_mm512_srlv_epi32(all, _mm512_load_si512(kShift.of)), _mm512_set1_epi32((1 << kBits) - 1));
  }

 private:
  static constexpr Words kUnsignedHighNibbles = nibble_numbers([](int code) { return 16 * code; });
};

// Two registers hold the words of two columns and 128 rows. The kernel interleaves the halves of the words, so that a
// dword holds the codes of four rows in both columns.
struct AwqPanel : PanelStep {
  static constexpr int kRows = 128, kSums = 8, kMostTokens = 3, kCodes = 1, kLineRows = 128;
  static int column_of(int, int word) { return word; }
  static bool accepts(const PackedView& w) { return w.columns % 32 == 0 && one_group_in_32(w, nullptr); }
  static int64_t units(const PackedView& w) { return ceil_div(w.rows, kRows); }

  static const uint32_t* words(const PackedView& w, int64_t k, int64_t n) {
    return static_cast<const uint32_t*>(w.part[0]) + (k * w.rows + n) / 8;
  }

  template <int kTokens>
  static void multiply(const PackedView& w, const uint32_t* const* x, int64_t begin, int64_t end, int64_t n,
                       const uint32_t* next, Ahead* ahead, __m512 (&out)[kSums][kTokens]) {
    __m512 sums[kSums][kTokens];
    clear(sums);
    const int64_t stride = w.rows / 8;
    const uint32_t* from = words(w, begin, n);
    const __mmask16 mask = first_lanes(stride - n / 8);
    for (int64_t k = begin; k < end; k += 2, from += 2 * stride, next += 2 * stride) {
      const __m512i even = _mm512_maskz_loadu_epi32(mask, from), odd = _mm512_maskz_loadu_epi32(mask, from + stride);
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(next + stride), _MM_HINT_T0);
      if (ahead) ahead->fetch(), ahead->fetch();
      const __m512i pairs[2] = {_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)};
      __m512bh tokens[kTokens];
      for (int t = 0; t < kTokens; ++t)
        tokens[t] = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x[t][k / 2])));
#pragma GCC unroll 8
      for (int i = 0; i < kSums; ++i) {
        const __m512bh of_rows = looked_up(at_nibble(pairs[i / 4], i % 4), kLowNibbles);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) sums[i][t] = _mm512_dpbf16_ps(sums[i][t], tokens[t], of_rows);
      }
    }
    copy(sums, out);
  }

  // Orders the sums by rows: lane 2 q + p of sum 4 h + v belongs to row 2 v + p of the eight rows of word q / 2 * 4 + 2
  // h + q % 2.
  static void arrange(__m512 (&sums)[kSums]) {
    __m512 out[kSums];
    for (int h = 0; h < 2; ++h) {
      const auto wide = [&](int v) { return _mm512_castps_pd(sums[4 * h + v]); };
      const __m512 a = _mm512_castpd_ps(_mm512_unpacklo_pd(wide(0), wide(1)));
      const __m512 b = _mm512_castpd_ps(_mm512_unpacklo_pd(wide(2), wide(3)));
      const __m512 c = _mm512_castpd_ps(_mm512_unpackhi_pd(wide(0), wide(1)));
      const __m512 d = _mm512_castpd_ps(_mm512_unpackhi_pd(wide(2), wide(3)));
      const __m512 ab[2] = {_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)};
      const __m512 cd[2] = {_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee)};
      for (int i = 0; i < 2; ++i) {
        out[4 * i + h] = _mm512_shuffle_f32x4(ab[i], cd[i], 0x88);
        out[4 * i + 2 + h] = _mm512_shuffle_f32x4(ab[i], cd[i], 0xdd);
      }
    }
    for (int i = 0; i < kSums; ++i) sums[i] = out[i];
  }

  static __m512i zeros(const PackedView& w, int64_t group, int64_t n) {
    const int64_t count = w.rows / 8, at = n / 8;
    const uint32_t* from = static_cast<const uint32_t*>(w.part[2]) + group * count + at;
    const __m512i held = _mm512_maskz_loadu_epi32(first_lanes(min_i64(count - at, 2)), from);
    static constexpr Lanes kWord = lanes_of_each([](int lane) { return lane / 8; });
    static constexpr Lanes kShift = lanes_of_each([](int lane) { return lane % 2 * 16 + lane % 8 / 2 * 4; });
    return _mm512_and_si512(
        _mm512_srlv_epi32(_mm512_permutexvar_epi32(_mm512_load_si512(kWord.of), held), _mm512_load_si512(kShift.of)),
        _mm512_set1_epi32(15));
  }
};

// The columns [begin, end) of W, which are all in group `group`.
struct Band {
  int64_t begin, end, group;
};

// Adds the products of a band and a panel, from row n on, to y; the first band overwrites y. x_sums[t] is the sum of
// token t's columns in the band.
template <typename Panel, int kTokens>
inline void multiply_panel(const PackedView& w, const bf16* x, const float* x_sums, const Band& band, int64_t n,
                           const uint32_t* next, Ahead* ahead, float* y) {
  const int64_t stride = ordered_columns(w.columns);
  __m512 sums[Panel::kSums][kTokens];
  const uint32_t* tokens[kTokens];
  for (int t = 0; t < kTokens; ++t) tokens[t] = reinterpret_cast<const uint32_t*>(x + t * stride);
  Panel::template multiply<kTokens>(w, tokens, band.begin, band.end, n, next, ahead, sums);
  for (int t = 0; t < kTokens; ++t) {
    __m512 of_token[Panel::kSums];
    for (int i = 0; i < Panel::kSums; ++i) of_token[i] = sums[i][t];
    Panel::arrange(of_token);
    for (int i = 0; i < Panel::kSums; ++i) sums[i][t] = of_token[i];
  }
  for (int i = 0; i < Panel::kSums; ++i) {
    const int64_t row = n + 16 * i;
    const __mmask16 mask = first_lanes(w.rows - row);
    if (mask == 0) break;
    const __m512 scale = scales16(w.part[1], scale_type(w.option), band.group * w.rows + row, mask);
    const __m512 add =
        _mm512_fnmadd_ps(_mm512_cvtepi32_ps(Panel::zeros(w, band.group, row)), scale, _mm512_setzero_ps());
    for (int t = 0; t < kTokens; ++t) {
      float* out = y + t * w.rows + row;
      __m512 total = band.begin == 0 ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, out);
      total = _mm512_fmadd_ps(sums[i][t], scale, total);
      _mm512_mask_storeu_ps(out, mask, _mm512_fmadd_ps(add, _mm512_set1_ps(x_sums[t]), total));
    }
  }
}

template <typename Panel>
void multiply_panels(const PackedView& w, const bf16* ordered, const float* sums, int64_t tokens, float* y,
                     int64_t begin, int64_t end) {
  const int64_t k = w.columns, stride = ordered_columns(k), group = w.group ? w.group : k;
  float x_sums[kMostFewTokens];
  for (Band band{0, 0, 0}; band.begin < k; band.begin = band.end) {
    band.group = band.begin / group;
    band.end = min_i64(min_i64(band.begin + band_columns(w), (band.group + 1) * group), k);
    for (int64_t t = 0; t < tokens; ++t) {
      x_sums[t] = 0.0f;
      for (int64_t i = band.begin / 32; i < band.end / 32; ++i) x_sums[t] += sums[t * stride / 16 + i];
    }
    const int64_t stride_words = Panel::words(w, Panel::kCodes, 0) - Panel::words(w, 0, 0);
    const int64_t lines = (end - begin) * (Panel::kRows / Panel::kLineRows);
    Ahead ahead(Panel::words(w, band.end, begin * Panel::kRows), stride_words, lines);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t n = panel * Panel::kRows;
      const uint32_t* next = panel + 1 < end ? Panel::words(w, band.begin, n + Panel::kRows)
                                             : Panel::words(w, band.end, begin * Panel::kRows);
      const auto run = [&](auto group_of, int64_t t) {
        multiply_panel<Panel, decltype(group_of)::kCount>(w, ordered + t * stride, x_sums + t, band, n, next,
                                                          t == 0 ? &ahead : nullptr, y + t * w.rows);
      };
      int64_t t = 0;
      for (; t + Panel::kMostTokens <= tokens; t += Panel::kMostTokens) run(TokenGroup<Panel::kMostTokens>(), t);
      if (t + 3 == tokens) run(TokenGroup<3>(), t);
      if (t + 2 == tokens) run(TokenGroup<2>(), t);
      if (t + 1 == tokens) run(TokenGroup<1>(), t);
    }
  }
}

template <typename Panel>
FewTokensKernels panels_of(const PackedView& w) {
  if (!Panel::accepts(w)) return {};
  return {Panel::units(w), order<Panel>, multiply_panels<Panel>};
}

}  // namespace

FewTokensKernels panel_kernels_avx512_bf16(int number, const PackedView& w) {
  if (number == 6) return code_bits(w.option) == 8 ? panels_of<GptqPanel<8>>(w) : panels_of<GptqPanel<4>>(w);
  return number == 7 ? panels_of<AwqPanel>(w) : FewTokensKernels{};
}

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
