// The skinny NF4 product for bfloat16 with AVX512-BF16.
//
//   y[t, n] = sum_k x[t, k] bf16(code[q] * absmax)
//
// 64 bytes of W are 128 elements, taken as 32 words of four codes each: shifted by 0, 4, 8 and 12 bits, their low bits
// are the indices of four registers of weights. So no code is moved to a lane of its own; x lies in the same order,
// permuted once for all rows. A register holds the tables of two blocks, 16 products each, rounded to bfloat16 once
// (vcvtne2ps2bf16, which takes subnormals for zero); bit 4 of an index says which. vpermw looks up, vdpbf16ps
// multiplies and adds pairs in float32. The weight is read once, 0.53 bytes an element, and never written. One thread
// owns rows.
#if defined(__x86_64__)
#include "cpu/target_avx512bf16.h"
// The target must be set before these headers are read.
#include <immintrin.h>

#include "nf4/nf4_code.h"
#include "nf4/cpu/nf4_kernels.h"
#include "cpu/token_groups.h"

namespace peft_ext {
namespace {

// Register j of a group of kNibbleGroup holds, in lane i, the element 4 i + kNibble[j].
constexpr int kNibble[4] = {1, 0, 3, 2};

// Rows [n, n + kRows) with kTokens tokens: a register of x serves kRows products.
template <int kTokens, int kRows>
inline void skinny_block(const Nf4Skinny& work, int64_t n, int64_t first_block, int64_t first_token) {
  // A sum waits for the product before it: eight or more of them keep the unit busy. Their number does not depend on
  // kRows, so that a row has the same bits beside others and alone.
  constexpr int kSums = kTokens >= 4 ? 1 : 2;
  const int64_t k = work.columns, stride = nibble_columns(k);
  const bf16* x = work.x_nibbles + first_token * stride;
  const __m512 code = _mm512_loadu_ps(kNf4Code);
  const __m512i low_bits = _mm512_set1_epi16(15);
  // The first 16 words belong to the first block of a group.
  const __m512i second_block = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  __m512 sums[kRows][kTokens][kSums];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t)
      for (int s = 0; s < kSums; ++s) sums[r][t][s] = _mm512_setzero_ps();
  for (int64_t j = 0; j < k; j += kNibbleGroup) {
    __m512i words[kRows], table[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int64_t flat = (n + r) * k + j;
      const auto scaled = [&](int64_t at) {
        return _mm512_mul_ps(code, _mm512_set1_ps(work.absmax[(at >> work.block_shift) - first_block]));
      };
      const __m512 first = scaled(flat);
      // The next block's rows: several rows at once are too many streams for the hardware to look ahead on.
      _mm_prefetch(reinterpret_cast<const char*>(work.packed + flat / 2 + kRows * k / 2), _MM_HINT_T1);
      __m512 second = _mm512_setzero_ps();
      if (j + kNibbleGroup <= k) {
        words[r] = _mm512_loadu_si512(work.packed + flat / 2);
        second = scaled(flat + kSkinnyStep);
      } else {  // half a group; x is zero where there is no weight
        words[r] = _mm512_maskz_loadu_epi64(0x0f, work.packed + flat / 2);
      }
      table[r] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    }
    for (int v = 0; v < 4; ++v) {
      __m512bh w[kRows];
      for (int r = 0; r < kRows; ++r) {
        const __m512i shifted = v == 0 ? words[r] : _mm512_srli_epi16(words[r], 4 * v);
        const __m512i index = _mm512_ternarylogic_epi32(shifted, low_bits, second_block, 0xEA);  // (a & b) | c
        w[r] = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(index, table[r]));
      }
      for (int t = 0; t < kTokens; ++t) {
        const auto values = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + t * stride + j + 32 * v));
        for (int r = 0; r < kRows; ++r) sums[r][t][v % kSums] = _mm512_dpbf16_ps(sums[r][t][v % kSums], values, w[r]);
      }
    }
  }
  // Unrolled, or the sums live in memory and are stored in every step.
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      __m512 total = sums[r][t][0];
      for (int s = 1; s < kSums; ++s) total = _mm512_add_ps(total, sums[r][t][s]);
      work.y[(first_token + t) * work.rows + n + r] = _mm512_reduce_add_ps(total);
    }
}

template <int kTokens>
void skinny_rows(const Nf4Skinny& work, int64_t begin, int64_t end, int64_t first_token) {
  constexpr int kRows = kTokens >= 8 ? 2 : 1;
  const int64_t first_block = begin * work.columns >> work.block_shift;
  int64_t n = begin;
  for (; n + kRows <= end; n += kRows) skinny_block<kTokens, kRows>(work, n, first_block, first_token);
  for (; n < end; ++n) skinny_block<kTokens, 1>(work, n, first_block, first_token);
}

}  // namespace

void nf4_nibble_order(const bf16* x, int64_t columns, bf16* out) {
  for (int64_t j = 0; j < columns; j += kNibbleGroup)
    for (int v = 0; v < 4; ++v)
      for (int i = 0; i < 32; ++i) {
        const int64_t from = j + 4 * i + kNibble[v];
        out[j + 32 * v + i] = from < columns ? x[from] : bf16{0};
      }
}

void nf4_skinny_bf16_avx512(const Nf4Skinny& work, int64_t begin, int64_t end) {
  for_token_groups(work.tokens,
                   [&](auto tokens, int64_t first) { skinny_rows<decltype(tokens)::kCount>(work, begin, end, first); });
}

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
