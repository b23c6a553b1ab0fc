// The low-rank path on the CPU, and what else passes over activations once: what each instruction set provides.
//
// Matrices of rank are float32, their rank padded with zeros to a multiple of kRankStep. Sums are float32 in an order
// that depends on the sizes alone.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/philox.h"

namespace peft_ext {

constexpr int64_t kRankStep = 16;
// Rows and columns that a pass takes together.
constexpr int kRowsTogether = 8;
constexpr int kColumnsTogether = 512;

// One pass over the rows [begin, end) and the columns [first, last) of m [T, K], dropped on the way when dropout is
// active (flat index t K + k); all columns where `right` or squares are given, else `first` is a multiple of
// kColumnStep:
//   right given:    out[t, r] = sum_k m[t, k] right[k, r]          S = x̃ Aᵀ,  P = dY B,  W Aᵀ
//   left given:     acc[k, r] += sum_t m[t, k] left[t, r]          dA = Pᵀ x̃, dB = dYᵀ S
//   totals given:   totals[k] += sum_t m[t, k]                     db of a bias
//   squares given:  squares[t] = sum_k m[t, k]²
//   keep given:     the mask as bits: k % 32 of word k / 32 of a row
struct RowPass {
  const void* m;
  DType dtype;
  int64_t columns;
  int64_t rank;  // padded
  Dropout dropout;
  const float* right = nullptr;  // [K, rank]
  float* out = nullptr;          // [T, rank]
  const float* left = nullptr;   // [T, rank]
  float* acc = nullptr;          // [K, rank], zeroed by the caller
  float* totals = nullptr;       // [K], zeroed by the caller
  float* squares = nullptr;      // [T]
  uint32_t* keep = nullptr;      // [T, keep_words]
  int64_t keep_words = 0;
};

// The end of a product that was made elsewhere, or of the low-rank one alone. For the rows [begin, end) and the columns
// [first, last), first a multiple of kColumnStep:
//   z = before + left right + bias_before;   y = mask/(1-p) ∘ scale ∘ z + bias + after + residual
// each element written once, rounded once to dtype. All but left and right may be absent; rank 0 has no low-rank term.
struct Expand {
  void* y;
  void* z = nullptr;
  DType dtype;
  int64_t columns;
  int64_t rank;    // padded
  int64_t stride;  // of right's rows and of the vectors: columns, padded with zeros to a multiple of kColumnStep
  Dropout dropout;
  const float* left = nullptr;         // [T, rank]
  const float* right = nullptr;        // [rank, stride]
  const float* bias_before = nullptr;  // [stride]
  const float* scale = nullptr;        // [stride]
  const float* bias = nullptr;         // [stride]
  const float* before = nullptr;       // [T, columns]
  const float* after = nullptr;        // [T, columns]
  const void* residual = nullptr;      // [T, columns] of dtype
};

constexpr int64_t kColumnStep = 32;

// Few tokens against the rows [begin, end) of w: y[t, n] (+)= sum_k x[t, k] w[n, k]. w is read once.
struct FewTokens {
  const void* w;  // [rows, columns]
  DType dtype;    // of w
  int64_t rows, columns, tokens;
  const float* x;  // [tokens, columns]
  float* y;        // [tokens, rows]
  bool accumulate = false;
};
constexpr int64_t kFewTokens = 8;

// One pass over the rows [begin, end) of m [T, K]:
//   out given:   out[t, k] = m[t, k] (scale[k] + shift), rounded once to m's type
//   sums given:  sums[k] += sum_t m[t, k] other[t, k]
struct ColumnPass {
  const void* m;
  DType dtype;
  int64_t columns;
  void* out = nullptr;  // of dtype
  const float* scale = nullptr;
  float shift = 0.0f;
  const void* other = nullptr;
  DType other_dtype = DType::kF32;
  float* sums = nullptr;  // [K], zeroed by the caller
};

// out = mask/(1-p) ∘ m for the flat elements [begin, end), begin a multiple of kDropTogether.
struct DropElements {
  const void* m;
  DType dtype;
  Dropout dropout;
  void* out;
};
constexpr int64_t kDropTogether = 512;

// Products with the elements that a mask hides, where they are few. W [N, K] comes as its columns, some rows of it at a
// time. For the tokens [begin, end):
//   dropped_product   out[t, n] += sum of m[t, k] W[n, k] over the k that are hidden, for kDroppedStrip n from `row` on
//   dropped_dots      out[t, k] (+)= sum_n m[t, n] W[n, k], for the k of kDroppedStrip from `column` on that are hidden
struct Dropped {
  const void* m;
  DType dtype;
  int64_t m_stride;  // of m's rows
  int64_t columns;   // K
  int64_t rows;      // of W, at most kDroppedRows
  const uint32_t* keep;
  int64_t keep_words;
  const float* turned;  // [K, stride], zeros behind the last of `rows`
  int64_t stride;       // a multiple of kDroppedStrip
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
