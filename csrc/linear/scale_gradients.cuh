// Gradients of scales that no pass over activations gives: of the ranks' from dB's own product, and of the outputs'
// that are so small that the output holds too little of what they scale.
#pragma once

#include "common/block_sum.cuh"
#include "linear/columns.cuh"
#include "nf4/nf4.cuh"

namespace peft_ext {

// out[n] = Σ_t dY[t, n] Z[t, n] where |g[n]| is so small that Y = g ∘ Z holds too little of Z:
// Z[t, n] = Σ_k x[t, k] W[n, k] + scaling Σ_r S[t, r] B[n, r] + bias[n], made again. A block per n; most return at
// once.
struct SmallScale {
  const void* grad;     // dY [rows, outputs]
  const void* x;        // [rows, inputs]
  const void* dense;    // W [outputs, inputs], or
  Nf4View nf4;          // W as NF4
  const float* scale;   // g
  const void* bias;     // T, or null
  const float* s;       // [rows, rank], or null
  const float* lora_B;  // [outputs, rank]
  float scaling;
  int64_t rows, outputs, inputs, rank;
  float* out;
};

// out[r] = scale Σ_n B[n, r] Q[n, r]: the gradient of a rank's scale. Grid: rank.
__global__ void __launch_bounds__(kColumnThreads)
    rank_scale_kernel(const float* lora_B, const float* products, int64_t rows, int64_t rank, float scale, float* out) {
  PEFT_EXT_SHARED(BlockSums<kColumnThreads>, shared);
  float sum = 0.0f;
  for (int64_t n = threadIdx.x; n < rows; n += kColumnThreads)
    sum += lora_B[n * rank + blockIdx.x] * products[n * rank + blockIdx.x];
  sum = block_sum<kColumnThreads>(sum, shared);
  if (threadIdx.x == 0) out[blockIdx.x] = scale * sum;
}

// Element of an NF4 weight, as a T holds it.
template <typename T>
__device__ __forceinline__ float nf4_element(const Nf4View& weight, int64_t element) {
  const uint32_t byte = weight.packed[element / 2];
  const float code = kNf4DeviceCode[element % 2 == 0 ? byte >> 4 : byte & 15u];
  return rounded_to<T>(fmul_rn(code, nf4_scale(weight, element >> weight.log2_blocksize)));
}

// Grid: outputs.
template <typename T>
__global__ void __launch_bounds__(kColumnThreads) small_scale_kernel(SmallScale work) {
  PEFT_EXT_SHARED(BlockSums<kColumnThreads>, shared);
  const int64_t n = blockIdx.x;
  if (fabsf(work.scale[n]) >= kSmallestScale) return;
  const T* grad = static_cast<const T*>(work.grad) + n;
  const T* x = static_cast<const T*>(work.x);
  float sum = 0.0f;
  for (int64_t k = threadIdx.x; k < work.inputs; k += kColumnThreads) {
    float gx = 0.0f;
    for (int64_t t = 0; t < work.rows; ++t)
      gx += load_value(grad + t * work.outputs) * load_value(x + t * work.inputs + k);
    const int64_t at = n * work.inputs + k;
    sum += gx *
           (work.dense != nullptr ? load_value(static_cast<const T*>(work.dense) + at) : nf4_element<T>(work.nf4, at));
  }
  const float bias = work.bias == nullptr ? 0.0f : load_value(static_cast<const T*>(work.bias) + n);
  for (int64_t t = threadIdx.x; t < work.rows; t += kColumnThreads) {
    float z = bias;
    for (int64_t r = 0; r < work.rank; ++r)
      z += work.scaling * work.s[t * work.rank + r] * work.lora_B[n * work.rank + r];
    sum += z * load_value(grad + t * work.outputs);
  }
  const float total = block_sum<kColumnThreads>(sum, shared);
  if (threadIdx.x == 0) work.out[n] = total;
}

}  // namespace peft_ext
