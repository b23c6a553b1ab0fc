// Small matrices into their terms; see linear/cuda/terms.cuh.
#pragma once

#include "linear/cuda/terms.cuh"

namespace peft_ext {

// One pair of each term, the pair-th along what is contiguous in the matrix.
__device__ __forceinline__ void split_pair_of(const Split& work, int64_t pair) {
  const int64_t pairs = work.out.inner / 2;
  if (pair >= work.out.outer * pairs) return;
  const bool along_inner = work.inner_stride == 1;
  const int64_t o = along_inner ? pair / pairs : pair % work.out.outer;
  const int64_t i = 2 * (along_inner ? pair % pairs : pair / work.out.outer);
  float values[2] = {0.0f, 0.0f};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (o >= work.outer || i + e >= work.inner) continue;
    float value = load_value(work.in, work.type, o * work.outer_stride + (i + e) * work.inner_stride);
    if (work.outer_scale != nullptr) value *= work.outer_scale[o];
    if (work.inner_scale != nullptr) value *= work.inner_scale[i + e];
    values[e] = value;
  }
  save_terms(work.out, o, i, values[0], values[1]);
}

// Grid: x: ceil(outer · inner / 2 / kSplitThreads) blocks of the largest, padded; y: which matrix.
static __global__ void __launch_bounds__(kSplitThreads) split_kernel(Splits splits) {
  split_pair_of(splits.work[blockIdx.y], static_cast<int64_t>(blockIdx.x) * kSplitThreads + threadIdx.x);
}

}  // namespace peft_ext
