// Declares the low-rank kernels on the CPU, and the other passes over activations. Each instruction set has a table of
// these kernels, a PassKernels.
//
// In RowPass and Expand, matrices with a dimension of the rank are float32. On one instruction set, the order of the
// sums depends only on the sizes, on whether dropout is active, and for Dropped also on the dropout mask.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/philox.h"

namespace peft_ext {

// Largest numbers of rows and of columns that an expand computes at a time. Most other kernels of this folder also work
// on kColumnsTogether columns at a time.
constexpr int kRowsTogether = 8;
constexpr int kColumnsTogether = 512;

// A RowPass is one pass over the rows [begin, end) and the columns [first, last) of m [T, K]. If dropout is active, the
// pass applies dropout to m first (element [t, k] has the flat index t K + k). If `right` or `squares` is given, the
// pass must have all columns; otherwise `first` is a multiple of kColumnStep. `totals` and `squares` may be given only
// if dropout is inactive. For each pointer that is given, the pass computes the formula in the pointer's line below.
// The right column lists uses of the formulas, in the letters of adapted_linear.h:
//   right given:    out[t, r] = sum_k m[t, k] right[r, k]          S = x̃ Aᵀ,  P = (g ∘ dY) ρB,  W Aᵀ.
//   left given:     acc[r, k] += sum_t left[t, r] m[t, k]          dA = Pᵀ x̃, dBᵀ = Sᵀ dY.
//                   `acc` does not contain dropout's scale 1/(1-p).
//   totals given:   totals[k] += sum_t m[t, k]                     gradient of a bias.
//   squares given:  squares[t] = sum_k m[t, k]².
//   keep given:     the bits of the dropout mask: bit k % 32 of word k / 32 of a row.
struct RowPass {
  const void* m;
  DType dtype;
  int64_t columns;
  int64_t rank;
  Dropout dropout;
  const float* right = nullptr;  // [rank, K]
  float* out = nullptr;          // [T, rank]
  const float* left = nullptr;   // [T, rank]
  float* acc = nullptr;          // sums [rank, K], which the caller has set to zero
  int64_t acc_stride = 0;        // distance in floats between rows of acc
  float* totals = nullptr;       // sums [K], which the caller has set to zero
  float* squares = nullptr;      // [T]
  uint32_t* keep = nullptr;      // [T, keep_words]
  int64_t keep_words = 0;
};

// An Expand is the last pass over a base product, or over the low-rank product alone. An Expand computes, for the rows
// [begin, end) and the columns [first, last), where first is a multiple of kColumnStep:
//   z = before + left right + bias_before;   y = mask/(1-p) ∘ scale ∘ z + bias + after + residual.
// Each element of y and z is written once and rounded once to dtype. An Expand leaves out each term whose pointer is
// null. If rank is 0, an Expand leaves out the low-rank term.
struct Expand {
  void* y;
  void* z = nullptr;
  DType dtype;
  int64_t columns;
  int64_t rank;
  int64_t stride;  // row stride of `right`, and length of the vectors: columns rounded up to kColumnStep
  Dropout dropout;
  const float* left = nullptr;         // [T, rank]
  const float* right = nullptr;        // [rank, stride]
  const float* bias_before = nullptr;  // [stride]
  const float* scale = nullptr;        // [stride]
  const float* bias = nullptr;         // [stride]
  const float* before = nullptr;       // [T, columns]
  const float* after = nullptr;        // [T, columns]
  const void* residual = nullptr;      // matrix [T, columns] of dtype, added last
};

constexpr int64_t kColumnStep = 32;

// Multiplies few tokens with the rows [begin, end) of w: y[t, n] = sum_k x[t, k] w[n, k], or += if `accumulate` is
// true. w is read once for each group of tokens that for_token_groups makes.
struct FewTokens {
  const void* w;  // [rows, columns]
  DType dtype;    // dtype of w
  int64_t rows, columns, tokens;
  const float* x;  // [tokens, columns]
  float* y;        // [tokens, rows]
  bool accumulate = false;
};
constexpr int64_t kFewTokens = 8;

// A ColumnPass is one pass over the rows [begin, end) of m [T, K]:
//   out given:   out[t, k] = m[t, k] (scale[k] + shift), rounded once to m's type.
//   sums given:  sums[k] += sum_t m[t, k] other[t, k].
struct ColumnPass {
  const void* m;
  DType dtype;
  int64_t columns;
  void* out = nullptr;  // result [T, K] of dtype
  const float* scale = nullptr;
  float shift = 0.0f;
  const void* other = nullptr;
  DType other_dtype = DType::kF32;
  float* sums = nullptr;  // sums [K], which the caller has set to zero
};

// Computes out = mask/(1-p) ∘ m for the flat elements [begin, end). begin is a multiple of kDropTogether.
struct DropElements {
  const void* m;
  DType dtype;
  Dropout dropout;
  void* out;
};
constexpr int64_t kDropTogether = 512;

// Computes products with the elements that the dropout mask drops, for masks that drop few elements. W [N, K] is given
// transposed, in groups of W's rows. For the tokens [begin, end):
//   dropped_product   out[t, n] += sum of m[t, k] W[n, k] over dropped k, for the strip of n that begins at `row`.
//   dropped_dots      out[t, k] = sum_n m[t, n] W[n, k], or += if `accumulate` is true, for dropped k of the strip that
//                     begins at `column`.
struct Dropped {
  const void* m;
  DType dtype;
  int64_t m_stride;  // distance in elements between rows of m
  int64_t columns;   // K
  int64_t rows;      // number of W's rows in this group, at most kDroppedRows
  const uint32_t* keep;
  int64_t keep_words;
  const float* turned;  // [K, stride]: the group of W's rows, transposed and zero-padded
  int64_t stride;       // distance in elements between rows of `turned`, a multiple of kDroppedStrip
  float* out;
  int64_t out_stride;
  bool accumulate = false;
};
constexpr int64_t kDroppedStrip = 64;
constexpr int64_t kDroppedRows = 1024;

struct PassKernels {
  void (*row_pass)(const RowPass& pass, int64_t begin, int64_t end, int64_t first, int64_t last);
  void (*expand)(const Expand& expand, int64_t begin, int64_t end, int64_t first, int64_t last);
  void (*drop_elements)(const DropElements& work, int64_t begin, int64_t end);
  void (*few_tokens)(const FewTokens& work, int64_t begin, int64_t end);
  void (*column_pass)(const ColumnPass& pass, int64_t begin, int64_t end);
  void (*dropped_product)(const Dropped& work, int64_t row, int64_t begin, int64_t end);
  void (*dropped_dots)(const Dropped& work, int64_t column, int64_t begin, int64_t end);
};

extern const PassKernels kPassKernelsScalar;
#if defined(__x86_64__)
extern const PassKernels kPassKernelsAvx2;
extern const PassKernels kPassKernelsAvx512;
#elif defined(__aarch64__)
extern const PassKernels kPassKernelsNeon;
#endif

}  // namespace peft_ext
