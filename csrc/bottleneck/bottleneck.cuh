// Kernels that run between the two products of a bottleneck adapter. bottleneck_kernel<false> (activate) and
// bottleneck_kernel<true> (gradient) work on U = x Dᵀ + b_d [T, M], a small float32 matrix, where D and b_d are the
// down weight and bias:
//
//   activate: computes U = sums + b_d and writes U, or reads U in the backward; writes H = act(U), scaled, as terms;
//   gradient: computes dU = P ∘ act'(U), where P is the gradient of H; writes dU, and dU as terms
//
// Terms are bfloat16 matrices whose sum is nearly the float32 matrix (linear/cuda/terms.cuh). In the forward, the terms
// of H are the left operand of expand and are stored row by row. In the backward, Hᵀ with one more row of ones is an
// operand of the rank pass over dY (linear/cuda/rank_pass.cuh): the product of dY with the row of ones, multiplied by
// the adapter's scale, is the gradient of the up bias. A thread computes two adjacent columns of H or dU. All
// arithmetic is float32.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/block_sum.cuh"
#include "linear/cuda/terms.cuh"

namespace peft_ext {

struct BottleneckWork {
  Activation activation;
  int64_t rows, size;  // T, M
  float* u;            // U [rows, size]; the kernel writes U if `sums` is given, otherwise reads U
  const float* sums;   // partial sums of x Dᵀ, [chunks][sums_rows][sums_columns]; null in the backward
  int64_t chunks, sums_rows, sums_columns;
  const float* bias;    // the down bias b_d [size]; null: no bias
  float scale;          // factor of H in the terms of H
  const float* grad_h;  // P, the gradient of H [rows, size]; read only by bottleneck_kernel<true>
  float* grad_u;        // receives dU [rows, size] from bottleneck_kernel<true>
  bool ones;
  int64_t padded_rows, padded_size;  // numbers of rows and columns of the terms, with padding
  TermsOut terms;                    // terms of H or dU, [padded_rows, padded_size]; no data if unneeded
  TermsOut transposed;               // transposed terms, [padded_size, padded_rows]; no data if unneeded
};

constexpr int kBottleneckThreads = 256;

// Grid: ceil(padded_rows · padded_size / 2 / kBottleneckThreads) blocks.
template <bool kGradient>
__global__ void __launch_bounds__(kBottleneckThreads) bottleneck_kernel(BottleneckWork work) {
  PEFT_EXT_KERNEL;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kBottleneckThreads + threadIdx.x;
  const int64_t pairs = work.padded_size / 2, row = pair / pairs, m = pair % pairs * 2;
  if (row >= work.padded_rows) return;
  float values[2] = {0.0f, 0.0f};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (row >= work.rows || m + e > work.size) continue;
    if (m + e == work.size) {
      values[e] = work.ones ? 1.0f : 0.0f;
      continue;
    }
    const int64_t at = row * work.size + m + e;
    float u;
    if (work.sums != nullptr) {
      u = work.bias == nullptr ? 0.0f : work.bias[m + e];
      const float* from = work.sums + row * work.sums_columns + m + e;
#pragma unroll 4
      for (int64_t chunk = 0; chunk < work.chunks; ++chunk) u += from[chunk * work.sums_rows * work.sums_columns];
      work.u[at] = u;
    } else {
      u = work.u[at];
    }
    if (kGradient) {
      values[e] = work.grad_h[at] * activation_slope(work.activation, u);
      work.grad_u[at] = values[e];
    } else {
      values[e] = work.scale * u * activation_gate(work.activation, u);
    }
  }
  if (work.terms.data != nullptr) save_terms(work.terms, row, m, values[0], values[1]);
  if (work.transposed.data != nullptr) save_terms_across(work.transposed, m, row, values[0], values[1]);
}

// Computes the gradient of the down bias, out[m] = Σ_t dU[t, m]. Grid: one block for each column m.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    bottleneck_bias_kernel(const float* grad_u, int64_t rows, int64_t size, float* out) {
  PEFT_EXT_KERNEL;
  PEFT_EXT_SHARED(BlockSums<kThreads>, shared);
  float sum = 0.0f;
  for (int64_t t = threadIdx.x; t < rows; t += kThreads) sum += grad_u[t * size + blockIdx.x];
  sum = block_sum<kThreads>(sum, shared);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

}  // namespace peft_ext
