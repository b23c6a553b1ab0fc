// The interface of the CPU kernels of plain and gated activations; each instruction set has a table of kernels. A
// kernel reads or writes each matrix once.
//
//   y = act(gate) ∘ up;   d gate = dY ∘ up ∘ act'(gate);   d up = dY ∘ act(gate);   if there is no up, up is 1
//
// Arithmetic is in float32, and each result is rounded once.
#pragma once

#include <stdint.h>

#include "common/activation.h"
#include "common/dtype.h"

namespace peft_ext {

struct StridedRows {
  const void* data = nullptr;
  int64_t stride = 0;
};

struct WrittenRows {
  void* data = nullptr;
  int64_t stride = 0;
};

struct GatedRows {
  Activation activation;
  DType dtype;  // dtype of gate, up, dY and all results
  int64_t columns;
  StridedRows gate, up;  // if up has no data, up is 1
  StridedRows grad;      // dY; has data only in the gradient
  WrittenRows out;       // receives y in the forward, d gate in the gradient
  WrittenRows out_up;    // receives d up in the gradient; has no data without up
};

// `rows` computes y and `gradient` computes d gate and d up for the rows [begin, end).
struct ActivationKernels {
  void (*rows)(const GatedRows& work, int64_t begin, int64_t end);
  void (*gradient)(const GatedRows& work, int64_t begin, int64_t end);
};

extern const ActivationKernels kActivationKernelsScalar;
#if defined(__x86_64__)
extern const ActivationKernels kActivationKernelsAvx2;
extern const ActivationKernels kActivationKernelsAvx512;
#elif defined(__aarch64__)
extern const ActivationKernels kActivationKernelsNeon;
#endif

// Returns the kernels for the current CPU path.
const ActivationKernels& activation_kernels();

}  // namespace peft_ext
