// Small matrices into their terms; see linear/cuda/terms.cuh.
#pragma once

#include "linear/cuda/terms.cuh"

namespace peft_ext {

// Grid: x: ceil(outer_padded · inner_padded / 2 / kSplitThreads) blocks of the largest; y: which matrix. A thread makes
// one pair of each term, a warp 128 bytes in a row.
static __global__ void __launch_bounds__(kSplitThreads) split_kernel(Splits splits) {
  const Split& work = splits.work[blockIdx.y];
  const int64_t word = static_cast<int64_t>(blockIdx.x) * kSplitThreads + threadIdx.x;
  const int64_t words = work.outer_padded * work.inner_padded / 2, across = work.inner_padded / 16;
  if (word >= words) return;
  // Which pair lies there: terms_word's inverse.
  const int lane = static_cast<int>(word % 64 / 2), upper = static_cast<int>(word % 2);
  const int64_t block = word / 64, o = block / across * 8 + lane / 4;
  const int64_t i = block % across * 16 + upper * 8 + lane % 4 * 2;
  float values[2] = {0.0f, 0.0f};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (o >= work.outer || i + e >= work.inner) continue;
    float value = load_value(work.in, work.type, o * work.outer_stride + (i + e) * work.inner_stride);
    if (work.inner_scale != nullptr) value *= work.inner_scale[i + e];
    values[e] = value;
  }
  uint32_t terms[kMaxTerms];
  split_pair<kMaxTerms>(values[0], values[1], terms);
  for (int term = 0; term < work.count; ++term) work.out[term * words + word] = terms[term];
}

}  // namespace peft_ext
