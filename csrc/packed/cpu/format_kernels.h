// The contract of the kernels that decode the formats of weight/formats/list.h on the CPU. Each instruction set has a
// table of these kernels for each format.
#pragma once

#include "weight/packed_view.h"

namespace peft_ext {

constexpr int64_t kRunColumns = 32;  // number of columns that a format's function decode32 decodes

struct FormatKernels {
  // Writes W[row + i, begin + j], rounded once from float32 to dtype, to out[i * stride + j], for i < rows and begin +
  // j < end.
  void (*decode)(const PackedView& w, int64_t row, int64_t rows, int64_t begin, int64_t end, void* out, int64_t stride,
                 DType dtype);
  // Writes y[t, n] = sum_k x[t, k] w[n, k] for the rows n of [begin, end), with x [tokens, columns] and y [tokens,
  // rows] in float32. few_tokens decodes the weight in registers or L1, without rounding, and reads the weight once for
  // each group of up to 8 tokens.
  void (*few_tokens)(const PackedView& w, const float* x, int64_t tokens, float* y, int64_t begin, int64_t end);
  // Returns whether few_tokens accepts the weight.
  bool (*has_few_tokens)(const PackedView& w);
  bool row_major;  // whether part 0, the first tensor of the weight, holds the codes row by row
};

constexpr int kFormatNumbers = 128;

// The kernels of an instruction set, by the number of the format. In the table, a number to which no format belongs has
// null pointers.
struct FormatTable {
  FormatKernels of[kFormatNumbers];
};

extern const FormatTable kFormatTableScalar;
#if defined(__x86_64__)
extern const FormatTable kFormatTableAvx2;
extern const FormatTable kFormatTableAvx512;
#elif defined(__aarch64__)
extern const FormatTable kFormatTableNeon;
#endif

// Returns the kernels of a format on the current CPU path, from the operators' argument `layout`. `layout` must hold
// the number of a format other than NF4.
const FormatKernels& format_kernels(int64_t layout);

// Largest number of tokens that FormatKernels::few_tokens is used for. For more than kFormatFewTokens tokens, decoding
// the weight once and multiplying is as fast.
constexpr int64_t kFormatFewTokens = 8;

}  // namespace peft_ext
