// The interface of the CPU kernels that compute the cross entropy of rows of logits x.
//
//   z = c tanh(a x / c), or a x if c = 0;   lse = log Σ_v exp z_v;   ε is the smoothing;
//   loss = (1 - ε) (lse - z_label) + ε (lse - mean z);
//   x <- w dloss/dx = w a (1 - (z/c)²) (exp(z - lse) - (1 - ε) [v = label] - ε / V)
//
// In these formulas, a is the scale of the logits, c is the softcap, w is the weight of the row, and V is the number of
// columns. If c = 0, the factor 1 - (z/c)² is left out.
//
// A kernel reads a row once for the largest z, and once for the sums of exp(z - largest) and of z. If needs_grad, the
// kernel reads the row a third time and overwrites the row with the gradient. Between the readings, a row of a 16-bit
// dtype usually stays in the CPU's L2 cache. Arithmetic is float32. The order in which a row's terms are added depends
// only on V and on the CPU path.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace peft_ext {

struct CrossEntropy {
  void* logits;  // logits x [T, V]; overwritten with the gradient if needs_grad
  DType dtype;
  int64_t columns;          // V
  const int64_t* labels;    // labels [T], from 0 to V - 1, or `ignored` for loss and gradient 0
  const float* row_weight;  // row weights w [T]; a null pointer stands for ones
  float* losses;            // receives the losses [T], not multiplied by w
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
