// The interface of the CPU kernels of RMSNorm and LayerNorm; each instruction set has a table of kernels. A kernel
// reads a row from memory once, and after that from the cache. Sums are float32. The order of the additions in a sum
// over a row depends only on the row's length and on the CPU path.
//
//   x̂ = (x - μ) r;   r = 1/√(mean (x - μ)² + eps);   y = x̂ ∘ factor + bias;   RMSNorm has μ = 0;
//   dX = r (g - mean g - x̂ mean (g ∘ x̂));   g = dY ∘ factor;   dw = Σ_t dY ∘ x̂;   db = Σ_t dY;
//   RMSNorm has no term mean g
//
// `factor` is the norm's weight w plus an offset, such as 1 in Gemma's norms.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace peft_ext {

struct NormRows {
  DType dtype, out_dtype;  // dtype: the dtype of x; out_dtype: the dtype of y, which is x's dtype or float32
  int64_t columns;
  bool centered;     // true for LayerNorm, false for RMSNorm
  bool round_first;  // whether x̂ is rounded to x's dtype before it is multiplied by factor
  float eps;
  const void* x;                  // x [T, columns]
  const float* factor = nullptr;  // factor [columns]; a null pointer stands for ones
  const float* bias = nullptr;    // bias b [columns]; a null pointer stands for zeros
  void* y;                        // y [T, columns], which may be the memory of x if the dtypes are equal
  float* mean = nullptr;          // μ [T]; null for RMSNorm
  float* rstd;                    // r [T]
};

struct NormGradient {
  DType dtype, grad_dtype;  // dtype: the dtype of x and dX; grad_dtype: the dtype of dY, which is x's dtype or float32
  int64_t columns;
  bool centered;
  const void* grad;               // dY [T, columns]
  const void* x;                  // x [T, columns]
  const float* factor = nullptr;  // factor [columns]; a null pointer stands for ones
  const float* mean = nullptr;    // μ [T]; null for RMSNorm
  const float* rstd;              // r [T]
  void* grad_x = nullptr;         // dX [T, columns]; null if the call does not need dX
  float* grad_weight = nullptr;   // dw [columns], to which the kernel adds; null if the call does not need dw
  float* grad_bias = nullptr;     // db [columns], to which the kernel adds; null if the call does not need db
};

// `rows` computes y and `gradient` computes dX, dw and db for the rows [begin, end).
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

// Returns the kernels for the current CPU path.
const NormKernels& norm_kernels();

}  // namespace peft_ext
