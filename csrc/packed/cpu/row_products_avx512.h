// The products of few_tokens_kernels.h for weights that are stored row by row, with AVX512-BF16: one template over the
// steps in which a format reads a row.
//
// A chunk is kChunkColumns columns of a row, whose scales are decoded together. A step of a kernel multiplies kPhases
// phases of kColumns columns. In a phase, kParts registers (the parts) of 32 numbers each are made from the codes, with
// as few operations as possible: the codes are not unpacked to one lane for each code. Instead x is permuted once for
// all rows, to the order of the codes. vpermw looks numbers up by the low bits of 32 words, and vdpbf16ps multiplies
// and adds pairs in float32. Registers whose lanes have the same scales share a sum, which is multiplied by the scales
// at the end of the phase. Words of four nibbles are shifted by 0, 4, 8 and 12 bits for four registers.
//
// The steps of a format are a struct with the following members:
//
//   bool accepts(w)                       returns whether the steps can read the weight w.
//   int64_t units(w)                      returns the number of rows, or with kOutputs 2 of pairs of rows, of W.
//   int64_t row_bytes(w)                  returns the number of bytes between the codes of two rows.
//   int kColumns, kParts, kSums           are the numbers of columns, parts and sums of a phase.
//   int kPhases                           is the number of phases of a step.
//   int kOutputs                          is 1, or 2 if the sums 0 and 1 belong to two rows of W, units() apart.
//   AddsAt kAdds                          tells where addends are added: in each step, in each chunk, or nowhere.
//   int kAddColumns                       is the number of columns that share one addend.
//   int register_of(part)                 returns the register of x, within the phase, that a part is multiplied with.
//   int sum_of(part)                      returns the sum to which the products of a part are added.
//   int column_of(reg, word)              returns the column, within the phase, that a word of a register of x holds.
//   open(w, row)                          prepares the step for a row of W.
//   enter(start, stop)                    prepares the step for the columns [start, stop), which are one chunk.
//   Held load(column, blocks)             reads the step from `column` on, of which `blocks` * 32 columns exist.
//   __m512bh numbers(held, phase, part)   returns the 32 numbers of a part.
//   __m512 scale(held, phase, sum)        returns the scales of the 16 lanes of a sum.
//   __m512 step_addends(held)             returns, with kInStep, the addends of the step's blocks, then zeros.
//   const float* chunk_addends(output)    returns, with kInChunk, the addends of the chunk's blocks, then zeros.
//   const uint8_t* bytes(column)          returns the address of the codes from `column` on, for a prefetch.
//   int kBytes                            is the number of bytes of a step's codes.
//
// For columns beyond the end of a row, scale() returns 0. Include this file after the target pragma.
#pragma once

#include <immintrin.h>

#include "cpu/prefetch.h"
#include "cpu/token_groups.h"
#include "packed/cpu/few_tokens_kernels.h"

namespace peft_ext {
namespace {

constexpr int64_t kChunkColumns = 4096;  // number of columns whose scales are decoded together

enum class AddsAt : int { kNone, kInStep, kInChunk };

// OneRowStep: base of the steps, with the members that most steps share. A step redefines the members of OneRowStep
// that differ.
struct OneRowStep {
  static constexpr int kPhases = 1, kSums = 1, kOutputs = 1, kAddColumns = 32;
  static constexpr AddsAt kAdds = AddsAt::kNone;
  static constexpr int register_of(int part) { return part; }
  static constexpr int sum_of(int) { return 0; }
  static int64_t units(const PackedView& w) { return w.rows; }
  void enter(int64_t, int64_t) {}
};

// Returns the column of a word in registers of x for codes in the order kHalves: 16 bytes hold a block of 32 columns,
// and the low nibbles are the block's first 16 columns.
constexpr int halves_column(int reg, int word) { return word / 8 * 32 + word % 8 * 2 + reg / 2 + reg % 2 * 16; }

// --- Tables of numbers -----------------------------------------------------------------------------------------------

// Returns the bits of an integer from -255 to 255 in bfloat16.
constexpr uint16_t bf16_bits(int value) {
  const int magnitude = value < 0 ? -value : value;
  if (magnitude == 0) return 0;
  int power = 0;
  while (magnitude >> power > 1) ++power;
  return static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | (127 + power) << 7 | (magnitude << (7 - power) & 0x7f));
}

// 32 words of 16 bits: the bfloat16 numbers that codes stand for, or the indices of a permutation.
struct Words {
  alignas(64) uint16_t of[32];
  __m512i load() const { return _mm512_load_si512(of); }
};

// Returns 32 words, of which word i is word_of(i).
template <typename WordOf>
constexpr Words words_of_each(const WordOf& word_of) {
  Words words{};
  for (int i = 0; i < 32; ++i) words.of[i] = static_cast<uint16_t>(word_of(i));
  return words;
}

// Returns a table of the bfloat16 numbers number_of(0) to number_of(15), twice: vpermw reads the low five bits of an
// index, of which only the low four bits are the code.
template <typename NumberOf>
constexpr Words nibble_numbers(const NumberOf& number_of) {
  return words_of_each([&](int i) { return bf16_bits(number_of(i & 15)); });
}

constexpr Words kLowNibbles = nibble_numbers([](int code) { return code; });
constexpr Words kSignedHighNibbles = nibble_numbers([](int code) { return 16 * ((code ^ 8) - 8); });

inline __m512bh looked_up(__m512i index, const Words& numbers) {
  return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(index, numbers.load()));
}

// Returns `words` shifted right by 4 * nibble bits.
inline __m512i at_nibble(__m512i words, int nibble) {
  return nibble == 0 ? words : _mm512_srli_epi16(words, 4 * nibble);
}

// 16 indices of lanes, for a permutation.
struct Lanes {
  alignas(64) int32_t of[16];
};

template <typename LaneOf>
constexpr Lanes lanes_of_each(const LaneOf& lane_of) {
  Lanes lanes{};
  for (int i = 0; i < 16; ++i) lanes.of[i] = lane_of(i);
  return lanes;
}

inline __m512 spread(const Lanes& lanes, __m512 values) {
  return _mm512_permutexvar_ps(_mm512_load_si512(lanes.of), values);
}

// --- The product -----------------------------------------------------------------------------------------------------

template <typename Step>
void order(const bf16* x, int64_t tokens, int64_t columns, bf16* ordered, float* sums) {
  constexpr int kColumns = Step::kColumns;
  const int64_t stride = ordered_columns(columns);
  uint16_t from[kColumns];
  for (int i = 0; i < kColumns; ++i) from[i] = static_cast<uint16_t>(Step::column_of(i / 32, i % 32));
  for (int64_t t = 0; t < tokens; ++t) {
    const bf16* in = x + t * columns;
    for (int64_t j = 0; j < stride; j += kColumns)
      for (int i = 0; i < kColumns; ++i)
        ordered[t * stride + j + i] = j + from[i] < columns ? in[j + from[i]] : bf16{0};
    if (Step::kAdds == AddsAt::kNone) continue;
    float* out = sums + t * stride / 16;
    for (int64_t j = 0; j < stride; j += Step::kAddColumns) {
      float total = 0.0f;
      for (int64_t i = j; i < min_i64(j + Step::kAddColumns, columns); ++i) total += to_float(in[i]);
      *out++ = total;
    }
  }
}

// Computes the products of kTokens tokens with kRows units of W, from unit n on, and writes the products to y.
template <typename Step, int kTokens, int kRows>
inline void multiply_block(const PackedView& w, const bf16* x, const float* x_sums, int64_t n, float* y) {
  constexpr int kOutputs = Step::kOutputs, kColumns = Step::kColumns, kStep = kColumns * Step::kPhases;
  const int64_t k = w.columns, stride = ordered_columns(k);
  Step steps[kRows];
  __m512 total[kRows][kOutputs][kTokens];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    steps[r].open(w, n + r);
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) total[r][o][t] = _mm512_setzero_ps();
  }
  const int64_t ahead = prefetch_distance(kRows * steps[0].row_bytes(w));
  for (int64_t start = 0; start < k; start += kChunkColumns) {
    const int64_t stop = min_i64(start + kChunkColumns, k);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) steps[r].enter(start, stop);
    for (int64_t j = start; j < stop; j += kStep) {
      const int blocks = static_cast<int>(min_i64(kStep, stop - j) / 32);
      typename Step::Held held[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        held[r] = steps[r].load(j, blocks);
        for (int i = 0; i < Step::kBytes; i += 64)
          _mm_prefetch(reinterpret_cast<const char*>(steps[r].bytes(j)) + ahead + i, _MM_HINT_T1);
      }
#pragma GCC unroll 2
      for (int phase = 0; phase < Step::kPhases; ++phase) {
        __m512 fresh[kRows][Step::kSums][kTokens];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
          for (int s = 0; s < Step::kSums; ++s)
#pragma GCC unroll 8
            for (int t = 0; t < kTokens; ++t) fresh[r][s][t] = _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int p = 0; p < Step::kParts; ++p) {
          __m512bh numbers[kRows];
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) numbers[r] = steps[r].numbers(held[r], phase, p);
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) {
            const auto token = reinterpret_cast<__m512bh>(
                _mm512_loadu_si512(x + t * stride + j + kColumns * phase + 32 * Step::register_of(p)));
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
              __m512& sum = fresh[r][Step::sum_of(p)][t];
              sum = _mm512_dpbf16_ps(sum, token, numbers[r]);
            }
          }
        }
#pragma GCC unroll 4
        for (int s = 0; s < Step::kSums; ++s)
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const __m512 by = steps[r].scale(held[r], phase, s);
#pragma GCC unroll 8
            for (int t = 0; t < kTokens; ++t) {
              __m512& sum = total[r][s % kOutputs][t];
              sum = _mm512_fmadd_ps(fresh[r][s][t], by, sum);
            }
          }
      }
      if constexpr (Step::kAdds == AddsAt::kInStep) {
        constexpr int kAddends = kStep / Step::kAddColumns;
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const __m512 add = steps[r].step_addends(held[r]);
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t)
            total[r][0][t] = _mm512_fmadd_ps(
                add, _mm512_maskz_loadu_ps((1 << kAddends) - 1, x_sums + t * stride / 16 + j / Step::kAddColumns),
                total[r][0][t]);
        }
      }
    }
    if constexpr (Step::kAdds == AddsAt::kInChunk) {
      for (int64_t i = 0; i < (stop - start) / Step::kAddColumns; i += 16)
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          // The mask leaves out sums of later columns: an addend of 0 times an infinite sum would be NaN.
          const __m512 sums = _mm512_maskz_loadu_ps(
              static_cast<__mmask16>((1 << min_i64(16, (stop - start) / Step::kAddColumns - i)) - 1),
              x_sums + t * stride / 16 + start / Step::kAddColumns + i);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int o = 0; o < kOutputs; ++o)
              total[r][o][t] = _mm512_fmadd_ps(_mm512_loadu_ps(steps[r].chunk_addends(o) + i), sums, total[r][o][t]);
        }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
        y[t * w.rows + n + r + o * Step::units(w)] = _mm512_reduce_add_ps(total[r][o][t]);
}

template <typename Step, int kRows>
inline void multiply_rows(const PackedView& w, const bf16* ordered, const float* sums, int64_t tokens, float* y,
                          int64_t n) {
  const int64_t stride = ordered_columns(w.columns);
  for_token_groups(tokens, [&](auto group, int64_t first) {
    // kTokens and kTogether are so small that the sums of all rows and tokens stay in registers.
    constexpr int kCount = decltype(group)::kCount, kTokens = kCount < 4 ? kCount : 4;
    constexpr int kTogether = kTokens * Step::kSums * kRows > 8 ? 1 : kRows;
    for (int64_t t = first; t < first + kCount; t += kTokens)
      for (int r = 0; r < kRows; r += kTogether)
        multiply_block<Step, kTokens, kTogether>(w, ordered + t * stride, sums + t * stride / 16, n + r,
                                                 y + t * w.rows);
  });
}

template <typename Step>
void multiply(const PackedView& w, const bf16* ordered, const float* sums, int64_t tokens, float* y, int64_t begin,
              int64_t end) {
  constexpr int kRows = 2;
  int64_t n = begin;
  for (; n + kRows <= end; n += kRows) multiply_rows<Step, kRows>(w, ordered, sums, tokens, y, n);
  for (; n < end; ++n) multiply_rows<Step, 1>(w, ordered, sums, tokens, y, n);
}

// Returns the kernels of the first step that accepts the weight, or null pointers.
template <typename Step, typename... Others>
FewTokensKernels first_of(const PackedView& w) {
  if (Step::accepts(w)) return {Step::units(w), order<Step>, multiply<Step>};
  if constexpr (sizeof...(Others) > 0) return first_of<Others...>(w);
  return {};
}

}  // namespace
}  // namespace peft_ext
