// The interface of the CPU kernels of the rotary position embedding; each instruction set has a kernel. With the halves
// x = (x₁, x₂) of a head, cos = (c₁, c₂) and sin = (s₁, s₂):
//
//   y₁ = x₁ c₁ - x₂ s₁;   y₂ = x₂ c₂ + x₁ s₂;   with back, the gradient: dx₁ = dy₁ c₁ + dy₂ s₂;   dx₂ = dy₂ c₂ - dy₁ s₁
//
// Arithmetic is in float32, and each result is rounded once. All heads of a token have the same cos and sin.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace peft_ext {

// An input x [B, H, T, D] (q or k) and its result y, whose last dimensions are contiguous.
struct Heads {
  const void* x;
  void* y;
  int64_t heads;
  int64_t x_batch, x_head, x_token;  // strides in elements
  int64_t y_batch, y_head, y_token;
};

struct Rotary {
  DType dtype;  // dtype of q, k, cos, sin and the results
  bool back;
  int64_t tokens, size;   // T and D
  Heads parts[2];         // q and k
  const void *cos, *sin;  // cos and sin [B or 1, T, D], contiguous
  int64_t cos_batch;      // stride of cos and sin between batches; 0 if one cos and sin serve all batches
};

// Rotates the tokens [begin, end) of the B · T tokens of all batches.
struct RotaryKernels {
  void (*rotate)(const Rotary& work, int64_t begin, int64_t end);
};

extern const RotaryKernels kRotaryKernelsScalar;
#if defined(__x86_64__)
extern const RotaryKernels kRotaryKernelsAvx2;
extern const RotaryKernels kRotaryKernelsAvx512;
#elif defined(__aarch64__)
extern const RotaryKernels kRotaryKernelsNeon;
#endif

// Returns the kernel for the current CPU path.
const RotaryKernels& rotary_kernels();

}  // namespace peft_ext
