// The contract of the products of few bfloat16 tokens and a packed weight, on a CPU with AVX512-BF16:
//
//   y[t, n] = sum over the blocks b of a row:  scale_b * sum_k x[t, k] c[k]  +  add_b * sum_k x[t, k]
//
// The weight is not decoded: a kernel looks up the number c that a code stands for without the scale. The number c is
// exact in bfloat16. Products of x and c are summed for each block b in float32, and the sums are multiplied by the
// block's scale, scale_b. The addend add_b of the block contains the zero point or the offset of the format; it is 0 if
// the format has neither. few_tokens_kernels.h does not depend on torch.
#pragma once

#include "weight/packed_view.h"

namespace peft_ext {

// Returns the number of columns of x in a kernel's order: `columns`, rounded up to the largest step of a kernel.
inline int64_t ordered_columns(int64_t columns) { return ceil_div(columns, 256) * 256; }

struct FewTokensKernels {
  int64_t units = 0;  // number of units of W (rows, pairs of rows or panels of rows) that are divided among threads
  // Permutes the columns of x [tokens, columns] to the order in which the kernel reads the format's codes, zero-padded
  // to ordered_columns, and writes the sums of x that the addends need: `sums` [tokens, ordered_columns / 16].
  void (*order)(const bf16* x, int64_t tokens, int64_t columns, bf16* ordered, float* sums) = nullptr;
  // Multiplies the units [begin, end) of W with x, and writes the products to y [tokens, rows]. multiply reads the
  // weight from memory once.
  void (*multiply)(const PackedView& w, const bf16* ordered, const float* sums, int64_t tokens, float* y, int64_t begin,
                   int64_t end) = nullptr;
};

// Largest number of tokens for which skinny.cpp calls the FewTokensKernels. For more than kMostFewTokens tokens,
// decoding the weight once and multiplying is as fast.
constexpr int64_t kMostFewTokens = 16;

// Each of the three functions below returns kernels for a weight in the format `number`, or null pointers if no kernel
// of the file that defines the function accepts the weight.
FewTokensKernels row_kernels_avx512_bf16(int number, const PackedView& w);
FewTokensKernels gguf_kernels_avx512_bf16(int number, const PackedView& w);
FewTokensKernels panel_kernels_avx512_bf16(int number, const PackedView& w);

}  // namespace peft_ext
