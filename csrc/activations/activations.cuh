// Kernel of plain and gated activations of rows [T, F], and of their gradients:
//
//   y = act(gate) ∘ up;   d gate = dY ∘ up ∘ act'(gate);   d up = dY ∘ act(gate);   if there is no up, up is 1
//
// A thread computes eight adjacent columns, 16 bytes of a 16-bit dtype; a block computes 2,048 columns of a row. Rows
// may have any stride, so that gate and up may be halves of one tensor. Arithmetic is in float32, and each result is
// rounded once: act(gate) is not rounded before the product with up. Each matrix is read or written once; with up, 3 T
// F elements are moved in the forward and 5 T F in the gradient.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/vector.cuh"

namespace peft_ext {

struct GatedWork {
  Activation activation;
  int64_t columns;
  const void *gate, *up, *grad;                 // up: null if there is no up; grad: dY, read only in the gradient
  int64_t gate_stride, up_stride, grad_stride;  // strides in elements between neighbouring rows of gate, up and dY
  void *out, *out_up;                           // out: y or d gate; out_up: d up, null in the forward and without up
  int64_t out_stride, out_up_stride;
  bool whole;  // whether groups of eight columns are aligned to 16 bytes in all matrices
};

constexpr int kGatedThreads = 256;
constexpr int64_t kGatedTile = kGatedThreads * kVector;

// Calls f with the activation as a constant, so that a branch on the activation runs once per eight columns.
template <typename F>
__device__ __forceinline__ void with_activation(Activation activation, const F& f) {
  if (activation == Activation::kGelu) return f(Activation::kGelu);
  if (activation == Activation::kGeluTanh) return f(Activation::kGeluTanh);
  if (activation == Activation::kRelu) return f(Activation::kRelu);
  if (activation == Activation::kSilu) return f(Activation::kSilu);
  return f(Activation::kRelu2);
}

// Computes eight columns of one row. If kValue is true, h = act(gate) ∘ up is written to `h`; if kGradient is true, the
// gradients of gate and up are written to `of_gate` and `of_up`. The results are not rounded.
template <bool kValue, bool kGradient>
__device__ __forceinline__ void gated_columns(Activation activation, const float (&gate)[kVector],
                                              const float (&up)[kVector], const float (&grad)[kVector],
                                              float (&h)[kVector], float (&of_gate)[kVector], float (&of_up)[kVector]) {
  with_activation(activation, [&](Activation known) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float value = gate[i] * activation_gate(known, gate[i]);
      if (kValue) h[i] = value * up[i];
      if (kGradient) {
        of_gate[i] = grad[i] * up[i] * activation_slope(known, gate[i]);
        of_up[i] = grad[i] * value;
      }
    }
  });
}

// Grid: x has a block for each row; y has a block for each tile of kGatedTile columns.
template <typename T, bool kGradient>
__global__ void __launch_bounds__(kGatedThreads) gated_kernel(GatedWork work) {
  PEFT_EXT_KERNEL;
  const int64_t row = blockIdx.x;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kGatedTile + threadIdx.x * kVector;
  if (column >= work.columns) return;
  float gate[kVector], up[kVector], grad[kVector], out[kVector], out_up[kVector];
  load_columns(static_cast<const T*>(work.gate) + row * work.gate_stride, column, work.columns, work.whole, gate);
#pragma unroll
  for (int i = 0; i < kVector; ++i) up[i] = 1.0f;
  if (work.up != nullptr)
    load_columns(static_cast<const T*>(work.up) + row * work.up_stride, column, work.columns, work.whole, up);
  if (kGradient)
    load_columns(static_cast<const T*>(work.grad) + row * work.grad_stride, column, work.columns, work.whole, grad);
  gated_columns<!kGradient, kGradient>(work.activation, gate, up, grad, out, out, out_up);
  save_columns(static_cast<T*>(work.out) + row * work.out_stride, column, work.columns, work.whole, out);
  if (kGradient && work.out_up != nullptr)
    save_columns(static_cast<T*>(work.out_up) + row * work.out_up_stride, column, work.columns, work.whole, out_up);
}

}  // namespace peft_ext
