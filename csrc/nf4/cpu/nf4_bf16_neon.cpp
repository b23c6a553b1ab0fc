// Computes the skinny product (few tokens with an NF4 weight) for bfloat16 with Arm's bfloat16 dot product (BFDOT).
//
//   y[t, n] = sum_blocks absmax sum_k x[t, k] bf16(code[q])
//
// 16 bytes of W contain 32 elements: the high nibbles are the codes of the even elements, and the low nibbles are the
// codes of the odd elements. The kernel looks up the low and the high bytes of the weights by code, and joins the bytes
// to four registers of weights. x is permuted once for all rows, to the order of the weights in the registers. BFDOT
// multiplies and adds pairs in float32; the sums of a step are then multiplied by the block's scale. Rounding the NF4
// values to bfloat16 changes a weight by at most 2^-9 of its magnitude, as much as rounding the product code * absmax
// would. The kernel reads W once for each group of tokens that for_token_groups makes, half a byte per element and the
// scales, and never writes a decoded weight to memory. Each thread computes whole rows of W.
#include "cpu/isa.h"

#if defined(PEFT_EXT_ARM_BF16)
#include "cpu/target_bf16_neon.h"
// The headers below must be included after the target pragma.
#include "cpu/simd_neon.h"
#include "cpu/token_groups.h"
#include "nf4/cpu/nf4_codes_neon.h"
#include "nf4/cpu/nf4_kernels.h"
#include "nf4/nf4_code.h"

namespace peft_ext {
namespace {

constexpr int kHalfStep = 32;

inline bfloat16x8_t load_bf16(const bf16* x) { return vreinterpretq_bf16_u16(vld1q_u16(words_of(x))); }

template <int kTokens>
void skinny_rows(const Nf4Skinny& work, int64_t begin, int64_t end, int64_t first_token) {
  const int64_t k = work.columns, first_block = begin * k >> work.block_shift;
  const bf16* x = work.x_ordered + first_token * k;
  bf16 code[16];
  for (int i = 0; i < 16; i += 4) store4(code + i, vld1q_f32(kNf4Code + i));
  const WordPlanes table = planes_of(code);
  for (int64_t n = begin; n < end; ++n) {
    float32x4_t sums[kTokens];
    for (int t = 0; t < kTokens; ++t) sums[t] = vdupq_n_f32(0.0f);
    for (int64_t j = 0; j < k; j += kSkinnyStep) {
      const int64_t flat = n * k + j;
      float32x4_t fresh[kTokens];
      for (int t = 0; t < kTokens; ++t) fresh[t] = vdupq_n_f32(0.0f);
      for (int half = 0; half < kSkinnyStep; half += kHalfStep) {
        const Nibbles codes = nibbles(work.packed + (flat + half) / 2);
        bfloat16x8_t w[4];
        for (int i = 0; i < 2; ++i) {
          const uint8x16_t index = i == 0 ? codes.even : codes.odd;
          const uint8x16_t low = vqtbl1q_u8(table.val[0], index), high = vqtbl1q_u8(table.val[1], index);
          w[2 * i] = vreinterpretq_bf16_u8(vzip1q_u8(low, high));
          w[2 * i + 1] = vreinterpretq_bf16_u8(vzip2q_u8(low, high));
        }
        for (int t = 0; t < kTokens; ++t)
          for (int i = 0; i < 4; ++i) fresh[t] = vbfdotq_f32(fresh[t], w[i], load_bf16(x + t * k + j + half + 8 * i));
      }
      const float scale = work.absmax[(flat >> work.block_shift) - first_block];
      for (int t = 0; t < kTokens; ++t) sums[t] = vfmaq_n_f32(sums[t], fresh[t], scale);
    }
    for (int t = 0; t < kTokens; ++t) work.y[(first_token + t) * work.rows + n] = vaddvq_f32(sums[t]);
  }
}

}  // namespace

void nf4_order_bf16_neon(const bf16* x, int64_t columns, bf16* out) {
  for (int64_t j = 0; j < columns; j += kHalfStep)
    for (int i = 0; i < 2; ++i) {
      const uint16x8x2_t pairs = vld2q_u16(words_of(x + j + 16 * i));
      vst1q_u16(words_of(out + j + 8 * i), pairs.val[0]);
      vst1q_u16(words_of(out + j + 16 + 8 * i), pairs.val[1]);
    }
}

void nf4_skinny_bf16_neon(const Nf4Skinny& work, int64_t begin, int64_t end) {
  for_token_groups(work.tokens,
                   [&](auto tokens, int64_t first) { skinny_rows<decltype(tokens)::kCount>(work, begin, end, first); });
}

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
