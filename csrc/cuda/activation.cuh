// Activation functions of one float, and their derivatives.
#pragma once

#include <math.h>

#include "common/activation.h"
#include "cuda/ptx.cuh"

namespace peft_ext {

// Returns the gate act(u) / u. GELU: 0.5 (1 + erf(u/√2)); GELU's tanh form: 0.5 (1 + tanh(√(2/π) (u + 0.044715 u³)));
// SiLU: 1 / (1 + e^-u); ReLU: 0 or 1; squared ReLU: max(u, 0).
__device__ __forceinline__ float activation_gate(Activation activation, float u) {
  if (activation == Activation::kGelu) return 0.5f * (1.0f + erff(u * 0.70710678118654752f));
  if (activation == Activation::kGeluTanh)
    return 0.5f * (1.0f + tanhf(0.79788456080286536f * (u + 0.044715f * u * u * u)));
  if (activation == Activation::kSilu) return 1.0f / (1.0f + expf(-u));
  const float step = u > 0.0f ? 1.0f : 0.0f;
  return activation == Activation::kRelu2 ? step * u : step;
}

// Returns the derivative d act(u) / du = gate + u · d gate / du, with gate = act(u) / u.
__device__ __forceinline__ float activation_slope(Activation activation, float u) {
  const float gate = activation_gate(activation, u);
  if (activation == Activation::kGelu) return gate + u * 0.39894228040143268f * expf(-0.5f * u * u);
  if (activation == Activation::kGeluTanh) {
    const float tanh = 2.0f * gate - 1.0f, inner = 0.79788456080286536f * (1.0f + 3.0f * 0.044715f * u * u);
    return gate + 0.5f * u * (1.0f - tanh * tanh) * inner;
  }
  if (activation == Activation::kSilu) return gate + u * gate * (1.0f - gate);
  return activation == Activation::kRelu2 ? 2.0f * gate : gate;
}

}  // namespace peft_ext
