// The contract of the products of few bfloat16 tokens and a weight of 4-bit codes, on a CPU with AVX512-BF16:
//
//   y[t, n] = sum over the blocks b of a row:  scale_b * sum_k x[t, k] table[q]  +  add_b * sum_k x[t, k]
//
// The weight is not decoded: products with the entries of the format's table, rounded to bfloat16, are summed for each
// block, and the sums are multiplied by the block's scale. The file does not depend on torch.
#pragma once

#include "weight/packed_view.h"

namespace peft_ext {

constexpr int64_t kNibbleColumns = 128;  // number of columns that are multiplied together: 64 bytes of codes

// Returns the number of columns of x in a kernel's order.
inline int64_t ordered_columns(int64_t columns) { return ceil_div(columns, kNibbleColumns) * kNibbleColumns; }

struct NibbleKernels {
  bool (*accepts)(const PackedView& w);  // whether the kernels multiply this weight
  // Permutes x [tokens, columns] to the order of the format's codes, zero-padded to whole groups of kNibbleColumns, and
  // writes the sums of each group's 16 lanes: `sums` [tokens, ordered_columns / 8].
  void (*order)(const bf16* x, int64_t tokens, int64_t columns, bf16* ordered, float* sums);
  // Multiplies the rows [begin, end) of W with x. y [tokens, rows]. The weight is read from memory once.
  void (*multiply)(const PackedView& w, const bf16* ordered, const float* sums, int64_t tokens, float* y, int64_t begin,
                   int64_t end);
};

constexpr int64_t kNibbleTokens = 12;  // for more tokens, decoding the weight once and multiplying is as fast

// Returns the kernels of a format, or null pointers if the format has none.
NibbleKernels nibble_kernels_avx512_bf16(int number);
// The same for the formats of 8-bit codes FP8, int8 and GGUF's Q8_0, whose codes are converted to bfloat16.
NibbleKernels byte_kernels_avx512_bf16(int number);

}  // namespace peft_ext
