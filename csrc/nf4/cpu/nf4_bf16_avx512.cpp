// Computes the skinny product (few tokens with an NF4 weight) for bfloat16 with AVX512-BF16.
//
//   y[t, n] = sum_k x[t, k] bf16(code[q] * absmax),  or, for a group of up to kScaledSums tokens,
//   y[t, n] = sum_blocks absmax sum_k x[t, k] bf16(code[q])
//
// A group of 128 elements of a row of W has 64 bytes, which are read as 32 words of four codes each. The low bits of a
// word after shifts by 0, 4, 8 and 12 bits are the indices for four registers of weights. The codes are not moved to
// lanes of their own; instead x is permuted once for all rows, to the order of the codes. vpermw looks the weights up,
// and vdpbf16ps multiplies and adds pairs in float32. For a group of up to kScaledSums tokens, one table with the 16
// NF4 values is used for all blocks, and the sums over 128 elements are then multiplied by the scales: the lower lanes
// by the scale of the block of the first 64 elements, the upper lanes by the scale of the block of the last 64
// elements. For more than kScaledSums tokens, scaling the sums would take too many multiplications, one for each token
// and 128 elements. For more than kScaledSums tokens, the table therefore holds the products code * absmax for each
// half of the 128 elements, 16 products for each half, rounded once to bfloat16 (vcvtne2ps2bf16, which flushes
// subnormals to zero), and bit 4 of an index selects the half. Rounding an NF4 value or a product to bfloat16 changes a
// weight by at most 2^-9 of its magnitude. The kernel reads W once for each group of tokens that for_token_groups
// makes, half a byte per element and the scales, and never writes a decoded weight to memory. Each thread computes
// whole rows of W.
#if defined(__x86_64__)
#include "cpu/target_avx512bf16.h"
// The headers below must be included after the target pragma.
#include <immintrin.h>

#include <type_traits>

#include "nf4/nf4_code.h"
#include "nf4/cpu/nf4_kernels.h"
#include "cpu/prefetch.h"
#include "cpu/token_groups.h"

namespace peft_ext {
namespace {

// In a group of kNibbleGroup elements, word i of the register of weights j holds the weight of element 4 i +
// kNibble[j].
constexpr int kNibble[4] = {1, 0, 3, 2};

// Largest number of tokens in a group for which the kernel multiplies the sums, instead of the table, by the scales.
constexpr int kScaledSums = 4;

// Returns the 16 NF4 values in bfloat16, twice, because vpermw reads five bits of an index, and the fifth bit of a
// shifted word belongs to another code.
__m512i code_table() {
  const __m512 code = _mm512_loadu_ps(kNf4Code);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(code, code));
}

// Reads the codes and the scales of kRows rows of W, from row n on. If each row begins with a block, as it does when
// the number of columns is a multiple of the block size (kAligned), the distance between two rows' blocks is the same
// for every column, and a column's block is computed once for all rows. This makes the product of one token 5% faster.
template <int kRows, bool kAligned>
struct CodeRows {
  CodeRows(const Nf4Skinny& work, int64_t n, int64_t first_block)
      : codes(work.packed + n * work.columns / 2),
        row_bytes(work.columns / 2),
        columns(work.columns),
        shift(work.block_shift),
        first_element(n * columns - (first_block << shift)),
        scales(kAligned ? work.absmax + (first_element >> shift) : work.absmax) {}

  const uint8_t* at(int row, int64_t column) const { return codes + row * row_bytes + (column >> 1); }

  __m512 scale(int row, int64_t column) const {
    if constexpr (kAligned) return _mm512_set1_ps(scales[row * (columns >> shift) + (column >> shift)]);
    return _mm512_set1_ps(scales[(first_element + row * columns + column) >> shift]);
  }

  const uint8_t* codes;  // the codes of row n
  int64_t row_bytes, columns;
  int shift;              // the block size is 1 << shift
  int64_t first_element;  // index of row n's first element, counted from the first element of block first_block
  const float* scales;
};

// Calls step(j, whole) for each group of kNibbleGroup columns of a row. `whole` is std::false_type for a last group
// with one block, beyond which x is zero, and otherwise std::true_type.
template <typename Step>
inline void for_groups(int64_t columns, const Step& step) {
  int64_t j = 0;
  for (; j + kNibbleGroup <= columns; j += kNibbleGroup) step(j, std::true_type());
  if (j < columns) step(j, std::false_type());
}

template <typename Whole>
inline __m512i load_codes(const uint8_t* from, Whole) {
  return Whole::value ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi64(0x0f, from);
}

// Computes the products of the rows [n, n + kRows) of W with kTokens <= kScaledSums tokens.
template <int kTokens, int kRows, bool kAligned>
inline void scaled_block(const Nf4Skinny& work, int64_t n, int64_t first_block, int64_t first_token, int64_t ahead) {
  const int64_t stride = nibble_columns(work.columns);
  const bf16* x = work.x_ordered + first_token * stride;
  const __m512i table = code_table();
  const CodeRows<kRows, kAligned> rows(work, n, first_block);
  __m512 sums[kRows][kTokens];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sums[r][t] = _mm512_setzero_ps();
  for_groups(work.columns, [&](int64_t j, auto whole) {
    __m512i words[kRows];
    __m512 scale[kRows], fresh[kRows][kTokens];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* from = rows.at(r, j);
      _mm_prefetch(reinterpret_cast<const char*>(from) + ahead, _MM_HINT_T1);
      words[r] = load_codes(from, whole);
      scale[r] = rows.scale(r, j);
      if constexpr (decltype(whole)::value)
        scale[r] = _mm512_mask_mov_ps(scale[r], 0xff00, rows.scale(r, j + kSkinnyStep));
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) fresh[r][t] = _mm512_setzero_ps();
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      __m512bh w[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m512i index = v == 0 ? words[r] : _mm512_srli_epi16(words[r], 4 * v);
        w[r] = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(index, table));
      }
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const auto values = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + t * stride + j + 32 * v));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) fresh[r][t] = _mm512_dpbf16_ps(fresh[r][t], values, w[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) sums[r][t] = _mm512_fmadd_ps(fresh[r][t], scale[r], sums[r][t]);
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) work.y[(first_token + t) * work.rows + n + r] = _mm512_reduce_add_ps(sums[r][t]);
}

// Computes the products of the rows [n, n + kRows) of W with kTokens tokens. A register of x is used for kRows
// products.
template <int kTokens, int kRows>
inline void skinny_block(const Nf4Skinny& work, int64_t n, int64_t first_block, int64_t first_token, int64_t ahead) {
  // kSums is the number of sums for each row and token. Several independent sums keep the multiplier busy, because each
  // addition to a sum must wait for the previous addition. kSums does not depend on kRows, so that the bits of a row do
  // not depend on how many rows are computed at a time.
  constexpr int kSums = kTokens >= 4 ? 1 : 2;
  const int64_t stride = nibble_columns(work.columns);
  const bf16* x = work.x_ordered + first_token * stride;
  const __m512 code = _mm512_loadu_ps(kNf4Code);
  const __m512i low_bits = _mm512_set1_epi16(15);
  // Each half of a group of 128 elements lies in one NF4 block: the group's first 16 words of four codes are looked up
  // with the scale of the first half's block, and the last 16 words with the scale of the second half's block.
  const __m512i second_block = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  const CodeRows<kRows, false> rows(work, n, first_block);
  __m512 sums[kRows][kTokens][kSums];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t)
      for (int s = 0; s < kSums; ++s) sums[r][t][s] = _mm512_setzero_ps();
  for_groups(work.columns, [&](int64_t j, auto whole) {
    __m512i words[kRows], table[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* from = rows.at(r, j);
      _mm_prefetch(reinterpret_cast<const char*>(from) + ahead, _MM_HINT_T1);
      words[r] = load_codes(from, whole);
      __m512 second = _mm512_setzero_ps();
      if constexpr (decltype(whole)::value) second = _mm512_mul_ps(code, rows.scale(r, j + kSkinnyStep));
      table[r] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, _mm512_mul_ps(code, rows.scale(r, j))));
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      __m512bh w[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m512i shifted = v == 0 ? words[r] : _mm512_srli_epi16(words[r], 4 * v);
        const __m512i index = _mm512_ternarylogic_epi32(shifted, low_bits, second_block, 0xEA);  // (a & b) | c
        w[r] = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(index, table[r]));
      }
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const auto values = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + t * stride + j + 32 * v));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[r][t][v % kSums] = _mm512_dpbf16_ps(sums[r][t][v % kSums], values, w[r]);
      }
    }
  });
  // The loop must be unrolled, because the compiler would otherwise keep the sums in memory and store the sums in every
  // step.
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      __m512 total = sums[r][t][0];
      for (int s = 1; s < kSums; ++s) total = _mm512_add_ps(total, sums[r][t][s]);
      work.y[(first_token + t) * work.rows + n + r] = _mm512_reduce_add_ps(total);
    }
}

template <int kTokens, bool kAligned>
void skinny_rows(const Nf4Skinny& work, int64_t begin, int64_t end, int64_t first_token) {
  constexpr int kRows = kTokens <= 2 ? 4 : kTokens <= kScaledSums || kTokens >= 8 ? 2 : 1;
  const int64_t first_block = begin * work.columns >> work.block_shift;
  const int64_t ahead = prefetch_distance(kRows * work.columns / 2);
  const auto block = [&](auto rows, int64_t n) {
    constexpr int kCount = decltype(rows)::value;
    if constexpr (kTokens <= kScaledSums)
      scaled_block<kTokens, kCount, kAligned>(work, n, first_block, first_token, ahead);
    else
      skinny_block<kTokens, kCount>(work, n, first_block, first_token, ahead);
  };
  int64_t n = begin;
  for (; n + kRows <= end; n += kRows) block(std::integral_constant<int, kRows>(), n);
  for (; n < end; ++n) block(std::integral_constant<int, 1>(), n);
}

}  // namespace

void nf4_nibble_order(const bf16* x, int64_t columns, bf16* out) {
  alignas(64) uint16_t order[4][32] = {};
  for (int v = 0; v < 4; ++v)
    for (int i = 0; i < 16; ++i) order[v][i] = static_cast<uint16_t>(4 * i + kNibble[v]);
  for (int64_t j = 0; j < columns; j += kNibbleGroup) {
    __m512i values[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t from = j + 32 * i;  // columns is a multiple of kSkinnyStep
      values[i] = from < columns ? _mm512_loadu_si512(x + from) : _mm512_setzero_si512();
    }
    for (int v = 0; v < 4; ++v) {
      const __m512i index = _mm512_load_si512(order[v]);
      const __m512i low = _mm512_permutex2var_epi16(values[0], index, values[1]);
      const __m512i high = _mm512_permutex2var_epi16(values[2], index, values[3]);
      _mm512_storeu_si512(out + j + 32 * v, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
    }
  }
}

void nf4_skinny_bf16_avx512(const Nf4Skinny& work, int64_t begin, int64_t end) {
  const bool aligned = work.columns % (int64_t{1} << work.block_shift) == 0;
  for_token_groups(work.tokens, [&](auto tokens, int64_t first) {
    constexpr int kTokens = decltype(tokens)::kCount;
    if constexpr (kTokens <= kScaledSums)
      if (aligned) return skinny_rows<kTokens, true>(work, begin, end, first);
    skinny_rows<kTokens, false>(work, begin, end, first);
  });
}

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
