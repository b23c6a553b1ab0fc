// What lies between the two products of a bottleneck adapter, U [T, M] float32 and small:
//
//   activate:  U = sums + b_d;  H = act(U)  -> U, and H, scaled, in terms
//   gradient:  dU = P ∘ act'(U)             -> dU, and it in terms
//
// H as expand's left side lies by rows, as a rank pass's L transposed, with a row of ones after the M of it: what dYᵀ
// makes of it is the bias's gradient. A thread makes two neighbouring columns. float32 throughout.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/block_sum.cuh"
#include "linear/cuda/terms.cuh"

namespace peft_ext {

struct BottleneckWork {
  Activation activation;
  int64_t rows, size;  // T, M
  float* u;            // [rows, size]; activate writes it where `sums` is given
  const float* sums;   // partial sums [chunks][sums_rows][sums_columns], or null
  int64_t chunks, sums_rows, sums_columns;
  const float* bias;    // b_d [size], or null
  float scale;          // of H
  const float* grad_h;  // gradient: P [rows, size]
  float* grad_u;        // gradient: [rows, size]
  bool ones;
  int64_t padded_rows, padded_size;  // of the terms
  TermsOut terms;                    // [padded_rows, padded_size], if wanted
  TermsOut transposed;               // [padded_size, padded_rows], if wanted
};

constexpr int kBottleneckThreads = 256;

// Grid: ceil(padded_rows · padded_size / 2 / kBottleneckThreads).
template <bool kGradient>
__global__ void __launch_bounds__(kBottleneckThreads) bottleneck_kernel(BottleneckWork work) {
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

// out[m] = Σ_t dU[t, m]. Grid: size.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    bottleneck_bias_kernel(const float* grad_u, int64_t rows, int64_t size, float* out) {
  PEFT_EXT_SHARED(BlockSums<kThreads>, shared);
  float sum = 0.0f;
  for (int64_t t = threadIdx.x; t < rows; t += kThreads) sum += grad_u[t * size + blockIdx.x];
  sum = block_sum<kThreads>(sum, shared);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

}  // namespace peft_ext
