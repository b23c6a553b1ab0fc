// The skinny NF4 product for bfloat16 with AVX512-BF16.
//
//   y[t, n] = sum_k x[t, k] bf16(code[q] * absmax)
//
// A block's 16 products are rounded to bfloat16 once (vcvtneps2bf16, which takes subnormals for zero); vpermw expands
// 32 codes to 32 weights, and vdpbf16ps multiplies them with 32 values of x as they lie and adds pairs in float32.
// The weight is read once, 0.53 bytes an element, and never written. One thread owns rows of w.
#if defined(__x86_64__)
#include "common/target_avx512bf16.h"
// The target must be set before these headers are read.
#include <immintrin.h>

#include "nf4/nf4_code.h"
#include "nf4/nf4_kernels.h"
#include "nf4/nf4_tokens.h"

namespace peft_ext {
namespace {

template <int kTokens>
void skinny_rows(const Nf4Skinny& work, int64_t begin, int64_t end, int64_t first_token) {
  constexpr int kVecs = static_cast<int>(kSkinnyStep) / 32;
  const int64_t k = work.columns;
  const int64_t first_block = begin * k / work.blocksize;
  const bf16* x = work.x_bf16 + first_token * k;
  const __m512 code = _mm512_loadu_ps(kNf4Code);
  for (int64_t n = begin; n < end; ++n) {
    __m512 sums[kTokens][kVecs];
    for (int t = 0; t < kTokens; ++t)
      for (int v = 0; v < kVecs; ++v) sums[t][v] = _mm512_setzero_ps();
    __m512i table = _mm512_setzero_si512();
    int64_t block = -1;
    for (int64_t j = 0; j < k; j += kSkinnyStep) {
      const int64_t flat = n * k + j;
      if (flat / work.blocksize != block) {
        block = flat / work.blocksize;
        const __m512 products = _mm512_mul_ps(code, _mm512_set1_ps(work.absmax[block - first_block]));
        table = _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(products)));
      }
      for (int v = 0; v < kVecs; ++v) {
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(work.packed + flat / 2) + v);
        const __m512i bytes = _mm512_cvtepu8_epi32(packed);
        const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        const __m512i w = _mm512_permutexvar_epi16(index, table);
        for (int t = 0; t < kTokens; ++t) {
          const __m512i values = _mm512_loadu_si512(x + t * k + j + 32 * v);
          sums[t][v] = _mm512_dpbf16_ps(sums[t][v], reinterpret_cast<__m512bh>(values), reinterpret_cast<__m512bh>(w));
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      __m512 total = sums[t][0];
      for (int v = 1; v < kVecs; ++v) total = _mm512_add_ps(total, sums[t][v]);
      work.y[(first_token + t) * work.rows + n] = _mm512_reduce_add_ps(total);
    }
  }
}

}  // namespace

void nf4_skinny_bf16_avx512(const Nf4Skinny& work, int64_t begin, int64_t end) {
  for_token_groups(work.tokens,
                   [&](auto tokens, int64_t first) { skinny_rows<decltype(tokens)::kCount>(work, begin, end, first); });
}

}  // namespace peft_ext
#include "common/target_end.h"
#endif
