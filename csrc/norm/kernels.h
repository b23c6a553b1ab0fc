// The contract of RMSNorm and LayerNorm on the CPU; each instruction set has a table of kernels. One pass over a row
// reads the row from memory once, and again from L1. Sums are float32. Their order depends only on the row's length and
// the path.
//
//   x̂ = (x - μ) r     r = 1/√(mean (x - μ)² + eps)     y = x̂ ∘ factor + bias      RMSNorm: μ is 0
//   dX = r (g - mean g - x̂ mean (g ∘ x̂)),  g = dY ∘ factor     dw = Σ_t dY ∘ x̂    db = Σ_t dY     RMSNorm: no mean g
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace peft_ext {

struct NormRows {
  DType dtype, out_dtype;  // dtype: that of x; out_dtype: that of y, x's or float32
  int64_t columns;
  bool centered;     // true for LayerNorm
  bool round_first;  // whether x̂ is rounded to x's dtype before it is multiplied by factor
  float eps;
  const void* x;                  // [T, columns]
  const float* factor = nullptr;  // [columns]; null: 1
  const float* bias = nullptr;    // [columns]; null: 0
  void* y;                        // [T, columns]
  float* mean = nullptr;          // [T], only if centered
  float* rstd;                    // [T]
};

struct NormGradient {
  DType dtype, grad_dtype;  // dtype: that of x and dX; grad_dtype: that of dY, x's or float32
  int64_t columns;
  bool centered;
  const void* grad;               // [T, columns]
  const void* x;                  // [T, columns]
  const float* factor = nullptr;  // [columns]; null: 1
  const float* mean = nullptr;    // [T], only if centered
  const float* rstd;              // [T]
  void* grad_x = nullptr;         // [T, columns], or null
  float* grad_weight = nullptr;   // [columns], added to; or null
  float* grad_bias = nullptr;     // [columns], added to; or null
};

// The functions work on the rows [begin, end).
struct NormKernels {
  void (*rows)(const NormRows& work, int64_t begin, int64_t end);
  void (*gradient)(const NormGradient& work, int64_t begin, int64_t end);
};

extern const NormKernels kNormKernelsScalar;
#if defined(__x86_64__)
extern const NormKernels kNormKernelsAvx2;
extern const NormKernels kNormKernelsAvx512;
#elif defined(__aarch64__)
extern const NormKernels kNormKernelsNeon;
#endif

}  // namespace peft_ext
