// The low-rank path on the CPU: what each instruction set provides.
//
// Two kernels serve forward and backward. Matrices of rank are float32, their rank padded with zeros to a multiple of
// kRankStep. Sums are float32 in an order that depends on the sizes alone.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/philox.h"

namespace peft_ext {

constexpr int64_t kRankStep = 16;

// One pass over the rows [begin, end) of m [T, K], dropped on the way when dropout is active (flat index t K + k):
//   right given:  out[t, r] = sum_k m[t, k] right[k, r]          S = x̃ Aᵀ,  P = dY B
//   left given:   acc[k, r] += sum_t m[t, k] left[t, r]          dA = Pᵀ x̃, dB = dYᵀ S
struct RowPass {
  const void* m;
  DType dtype;
  int64_t columns;
  int64_t rank;  // padded
  Dropout dropout;
  const float* right;  // [K, rank] or null
  float* out;          // [T, rank]
  const float* left;   // [T, rank] or null
  float* acc;          // [K, rank], zeroed by the caller
};

// y[t, n] = mask/(1-p) * sum_r left[t, r] right[r, n] + bias[n] + base[t, n] for the rows [begin, end), each element
// written once, rounded once to dtype. Dropout does not occur together with bias or base.
struct Expand {
  void* y;
  DType dtype;
  int64_t columns;
  int64_t rank;    // padded
  int64_t stride;  // of right's rows: columns, padded with zeros to a multiple of kColumnStep
  Dropout dropout;
  const float* left;   // [T, rank]
  const float* right;  // [rank, stride]
  const float* bias;   // [stride] or null
  const float* base;   // [T, columns] or null
};

constexpr int64_t kColumnStep = 32;

struct LoraKernels {
  void (*row_pass)(const RowPass& pass, int64_t begin, int64_t end);
  void (*expand)(const Expand& expand, int64_t begin, int64_t end);
};

extern const LoraKernels kLoraKernelsScalar;
#if defined(__x86_64__)
extern const LoraKernels kLoraKernelsAvx2;
extern const LoraKernels kLoraKernelsAvx512;
#endif

}  // namespace peft_ext
