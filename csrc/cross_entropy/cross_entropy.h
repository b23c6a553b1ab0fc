// Cross entropy of the rows of a chunk of logits on the CPU: what each instruction set provides.
//
//   z = c tanh(a x / c), or a x where c is 0     lse = log Σ_v exp z_v     ε: smoothing
//   loss = (1 - ε) (lse - z_label) + ε (lse - mean z)
//   x <- w dloss/dx = w a (1 - (z/c)²) (exp(z - lse) - (1 - ε) [v = label] - ε / V)
//
// A row is read for its maximum, for the sum, and for the gradient that it is overwritten with: of 16 bits it stays in
// the second-level cache between. Float32 arithmetic, sums in an order that depends on V alone.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace peft_ext {

struct CrossEntropy {
  void* logits;  // [T, V], overwritten where needs_grad
  DType dtype;
  int64_t columns;          // V
  const int64_t* labels;    // [T]; one that is ignored: loss and gradient are 0
  const float* row_weight;  // w [T], or null: ones
  float* losses;            // [T], without w
  float scale, softcap, smoothing;
  int64_t ignored;
  bool needs_grad;
};

struct CrossEntropyKernels {
  void (*rows)(const CrossEntropy& work, int64_t begin, int64_t end);
};

extern const CrossEntropyKernels kCrossEntropyScalar;
#if defined(__x86_64__)
extern const CrossEntropyKernels kCrossEntropyAvx2;
extern const CrossEntropyKernels kCrossEntropyAvx512;
#elif defined(__aarch64__)
extern const CrossEntropyKernels kCrossEntropyNeon;
#endif

}  // namespace peft_ext
