// Rotary position embedding of q [B, H, T, D] and k [B, Hkv, T, D]. With the halves x = (x₁, x₂) of a head, cos = (c₁,
// c₂) and sin = (s₁, s₂):
//
//   y₁ = x₁ c₁ - x₂ s₁;   y₂ = x₂ c₂ + x₁ s₂;  with kBack, the gradient: dx₁ = dy₁ c₁ + dy₂ s₂;   dx₂ = dy₂ c₂ - dy₁ s₁
//
// A thread block rotates all heads of q and k of one token, so that the token's cos and sin are read from memory once.
// A thread rotates eight columns of both halves at a time. The dimensions B, H and T of q and k may have any strides;
// each head is contiguous. Arithmetic is in float32, and each result is rounded once. Bytes moved: q and k are read and
// written once; cos and sin are read once for each batch.
#pragma once

#include "cuda/vector.cuh"

namespace peft_ext {

struct DeviceHeads {
  const void* x;
  void* y;
  int heads;
  int64_t x_batch, x_head, x_token;  // strides in elements
  int64_t y_batch, y_head, y_token;
};

struct DeviceRotary {
  DeviceHeads q, k;
  const void *cos, *sin;  // [B or 1, T, D]
  int64_t cos_batch;      // stride of cos and sin between batches; 0 if one cos and sin serve all batches
  int64_t tokens;
  int half;    // D / 2
  bool whole;  // whether groups of eight columns are aligned to 16 bytes in all tensors
};

constexpr int kRotaryThreads = 256;

// Grid: one thread block for each of the B · T tokens.
template <typename T, bool kBack>
__global__ void __launch_bounds__(kRotaryThreads) rotary_kernel(DeviceRotary work) {
  PEFT_EXT_KERNEL;
  const int64_t batch = blockIdx.x / work.tokens, token = blockIdx.x % work.tokens;
  const int64_t at = batch * work.cos_batch + token * 2 * work.half;
  const T *cos = static_cast<const T*>(work.cos) + at, *sin = static_cast<const T*>(work.sin) + at;
  const int vectors = (work.half + kVector - 1) / kVector, all = (work.q.heads + work.k.heads) * vectors;
  for (int i = threadIdx.x; i < all; i += kRotaryThreads) {
    const int head = i / vectors, column = i % vectors * kVector;
    const bool of_q = head < work.q.heads;
    const DeviceHeads& part = of_q ? work.q : work.k;
    const int64_t h = of_q ? head : head - work.q.heads;
    const T* x = static_cast<const T*>(part.x) + batch * part.x_batch + h * part.x_head + token * part.x_token;
    T* y = static_cast<T*>(part.y) + batch * part.y_batch + h * part.y_head + token * part.y_token;
    float x1[kVector], x2[kVector], c1[kVector], c2[kVector], s1[kVector], s2[kVector];
    load_columns(x, column, work.half, work.whole, x1);
    load_columns(x + work.half, column, work.half, work.whole, x2);
    load_columns(cos, column, work.half, work.whole, c1);
    load_columns(cos + work.half, column, work.half, work.whole, c2);
    load_columns(sin, column, work.half, work.whole, s1);
    load_columns(sin + work.half, column, work.half, work.whole, s2);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const float first = x1[e] * c1[e], second = x2[e] * c2[e];
      const float y1 = kBack ? first + x2[e] * s2[e] : first - x2[e] * s1[e];
      x2[e] = kBack ? second - x1[e] * s1[e] : second + x1[e] * s2[e];
      x1[e] = y1;
    }
    save_columns(y, column, work.half, work.whole, x1);
    save_columns(y + work.half, column, work.half, work.whole, x2);
  }
}

}  // namespace peft_ext
