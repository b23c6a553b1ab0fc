// Rotary position embedding on the CPU: what each instruction set provides. With x = (x₁, x₂), cos = (c₁, c₂) and
// sin = (s₁, s₂), halves of a head:
//
//   y₁ = x₁ c₁ - x₂ s₁      y₂ = x₂ c₂ + x₁ s₂                 back:  x₁ = y₁ c₁ + y₂ s₂      x₂ = y₂ c₂ - y₁ s₁
//
// float32, one rounding. Each head is read and written once; cos and sin of a token serve all its heads.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace peft_ext {

// [B, H, T, D], D in one piece.
struct Heads {
  const void* x;
  void* y;
  int64_t heads;
  int64_t x_batch, x_head, x_token;  // strides
  int64_t y_batch, y_head, y_token;
};

struct Rotary {
  DType dtype;  // of all
  bool back;
  int64_t tokens, size;   // T, D
  Heads parts[2];         // q and k
  const void *cos, *sin;  // [B or 1, T, D] contiguous
  int64_t cos_batch;      // stride: 0 where one serves all
};

// Of the tokens [begin, end) of [B T].
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

}  // namespace peft_ext
