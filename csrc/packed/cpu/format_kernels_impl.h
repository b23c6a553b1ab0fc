// The kernels of format_kernels.h, written with the type Vec, for the formats of weight/formats/list.h. The file that
// defines an instruction set's table includes this file, after the target pragma and simd_<isa>.h.
//
// The kernel `decode` decodes a run of 32 columns to a buffer in L1, and rounds and stores the run. With AVX-512,
// `decode` looks 4-bit codes up among 16 rounded values, and converts FP8 codes in registers. Columns before and after
// whole runs, and all columns of a weight that F::runs refuses, are decoded one by one. The kernel few_tokens decodes
// each step of kRunColumns columns of a row to a buffer that stays in registers or L1, and multiplies the step with all
// tokens of a group of up to 8. For a format with decode_rows, both kernels, `decode` and few_tokens, decode up to 16
// rows together, `decode` only if F::runs accepts the weight and `begin` and `end` are multiples of 32. One thread
// computes whole rows, so that a sum has one order for every number of threads. Sums are float32.
#pragma once

#include "cpu/token_groups.h"
#include "packed/cpu/format_kernels.h"
#include "packed/cpu/format_traits.h"
#include "weight/formats/list.h"

namespace peft_ext {
namespace {

// Rounds the values of 32 columns to T, and stores the rounded values.
template <typename T>
inline void store_run(const float* run, T* out) {
  for (int64_t i = 0; i < kRunColumns; i += Vec::kWidth) Vec::load(run + i).store_as(out + i);
}

// Writes the values of 32 columns from `column` on, a multiple of 32, rounded once to T.
template <typename F, typename T>
inline void decode_run(const PackedView& w, int64_t row, int64_t column, T* out) {
#ifdef PEFT_EXT_LOOKUP
  if constexpr (HasE4m3<F>::kValue) return e4m3_run(F::codes(w, row, column), F::scale(w, row, column), out);
  if constexpr (HasNibbles<F>::kValue) {
    if (F::has_nibbles(w)) {
      constexpr bool kTwo = F::kScaleColumns == 16;
      alignas(64) float entries[32];
      F::entries(w, row, column, entries);
      if (kTwo) F::entries(w, row, column + 16, entries + 16);
      return lookup32<F::kNibbles>(F::codes32(w, row, column), entries, kTwo, out);
    }
  }
#endif
  if constexpr (sizeof(T) == sizeof(float)) {
    F::decode32(w, row, column, out);
  } else {
    alignas(64) float run[kRunColumns];
    F::decode32(w, row, column, run);
    store_run(run, out);
  }
}

constexpr int64_t kRowsTogether = 16;  // largest number of rows that a call of decode_rows decodes

template <typename F>
struct KernelsOf {
  // The attribute gnu::flatten inlines all calls in decode_row, so that the scales and values of 32 columns stay in
  // registers.
  template <typename T>
  [[gnu::flatten]] static void decode_row(const PackedView& w, bool runs, int64_t row, int64_t begin, int64_t end,
                                          T* out) {
    int64_t k = begin;
    const auto one_by_one = [&](int64_t stop) {
      for (; k < stop; ++k) out[k - begin] = from_float<T>(F::value(w, row, k));
    };
    if (runs) {
      one_by_one(min_i64(ceil_div(begin, kRunColumns) * kRunColumns, end));
      for (; k + kRunColumns <= end; k += kRunColumns) decode_run<F>(w, row, k, out + (k - begin));
    }
    one_by_one(end);
  }

  // Decodes the rows [row, row + rows), up to 16 rows together. `begin` and `end` are multiples of 32.
  template <typename T>
  static void decode_row_blocks(const PackedView& w, int64_t row, int64_t rows, int64_t begin, int64_t end, T* out,
                                int64_t stride) {
    alignas(64) float block[kRowsTogether * kRunColumns];
    for (int64_t i = 0; i < rows; i += kRowsTogether) {
      const int64_t count = min_i64(kRowsTogether, rows - i);
      for (int64_t k = begin; k < end; k += kRunColumns) {
        F::decode_rows(w, row + i, count, k, block, kRunColumns);
        for (int64_t r = 0; r < count; ++r) store_run(block + r * kRunColumns, out + (i + r) * stride + (k - begin));
      }
    }
  }

  static void decode(const PackedView& w, int64_t row, int64_t rows, int64_t begin, int64_t end, void* out,
                     int64_t stride, DType dtype) {
    const bool runs = F::runs(w);
    with_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (HasRowBlocks<F>::kValue) {
        if (runs && begin % kRunColumns == 0 && end % kRunColumns == 0)
          return decode_row_blocks(w, row, rows, begin, end, static_cast<T*>(out), stride);
      }
      for (int64_t i = 0; i < rows; ++i) decode_row(w, runs, row + i, begin, end, static_cast<T*>(out) + i * stride);
    });
  }

  static bool has_few_tokens(const PackedView& w) { return F::runs(w) && w.columns % kRunColumns == 0; }

  template <int kTokens>
  static void few(const PackedView& w, const float* x, float* y, int64_t begin, int64_t end) {
    constexpr int kVecs = static_cast<int>(kRunColumns) / Vec::kWidth;
    constexpr int kSums = kTokens >= 4 ? 1 : kVecs < 4 ? kVecs : 4;
    const int64_t k = w.columns;
    for (int64_t n = begin; n < end; ++n) {
      Vec sums[kTokens][kSums];
      for (int t = 0; t < kTokens; ++t)
        for (int s = 0; s < kSums; ++s) sums[t][s] = Vec::zero();
      for (int64_t j = 0; j < k; j += kRunColumns) {
        alignas(64) float run[kRunColumns];
        decode_run<F>(w, n, j, run);
        for (int v = 0; v < kVecs; ++v) {
          const Vec value = Vec::load(run + v * Vec::kWidth);
          for (int t = 0; t < kTokens; ++t)
            sums[t][v % kSums] = Vec::fma(value, Vec::load(x + t * k + j + v * Vec::kWidth), sums[t][v % kSums]);
        }
      }
      for (int t = 0; t < kTokens; ++t) {
        Vec total = sums[t][0];
        for (int s = 1; s < kSums; ++s) total = Vec::add(total, sums[t][s]);
        y[t * w.rows + n] = total.sum();
      }
    }
  }

  // The variant of few() for formats with decode_rows, which computes up to 16 rows together.
  template <int kTokens>
  static void few_row_blocks(const PackedView& w, const float* x, float* y, int64_t begin, int64_t end) {
    constexpr int kVecs = static_cast<int>(kRunColumns) / Vec::kWidth;
    const int64_t k = w.columns;
    alignas(64) float block[kRowsTogether * kRunColumns];
    for (int64_t n = begin; n < end; n += kRowsTogether) {
      const int64_t count = min_i64(kRowsTogether, end - n);
      Vec sums[kRowsTogether][kTokens];
      for (auto& of_row : sums)
        for (Vec& sum : of_row) sum = Vec::zero();
      for (int64_t j = 0; j < k; j += kRunColumns) {
        F::decode_rows(w, n, count, j, block, kRunColumns);
        for (int t = 0; t < kTokens; ++t)
          for (int v = 0; v < kVecs; ++v) {
            const Vec token = Vec::load(x + t * k + j + v * Vec::kWidth);
            for (int64_t r = 0; r < count; ++r)
              sums[r][t] = Vec::fma(Vec::load(block + r * kRunColumns + v * Vec::kWidth), token, sums[r][t]);
          }
      }
      for (int64_t r = 0; r < count; ++r)
        for (int t = 0; t < kTokens; ++t) y[t * w.rows + n + r] = sums[r][t].sum();
    }
  }

  static void few_tokens(const PackedView& w, const float* x, int64_t tokens, float* y, int64_t begin, int64_t end) {
    for_token_groups(tokens, [&](auto group, int64_t first) {
      constexpr int kCount = decltype(group)::kCount;
      if constexpr (HasRowBlocks<F>::kValue)
        few_row_blocks<kCount>(w, x + first * w.columns, y + first * w.rows, begin, end);
      else
        few<kCount>(w, x + first * w.columns, y + first * w.rows, begin, end);
    });
  }
};

constexpr FormatTable make_table() {
  FormatTable table{};
#define FORMAT(number, Format)                                                                                     \
  table.of[number] = {KernelsOf<Format>::decode, KernelsOf<Format>::few_tokens, KernelsOf<Format>::has_few_tokens, \
                      IsRowMajor<Format>::kValue};
  PEFT_EXT_FORMATS(FORMAT)
#undef FORMAT
  return table;
}

}  // namespace
}  // namespace peft_ext
