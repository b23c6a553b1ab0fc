// split_kernel splits small matrices into bfloat16 terms; see linear/cuda/terms.cuh.
#pragma once

#include "linear/cuda/terms.cuh"

namespace peft_ext {

// Grid: x has ceil(outer · inner / 2 / kSplitThreads) thread blocks for the largest padded matrix; y is the index of
// the matrix.
static __global__ void __launch_bounds__(kSplitThreads) split_kernel(Splits splits) {
  PEFT_EXT_KERNEL;
  split_pair_of(splits.work[blockIdx.y], static_cast<int64_t>(blockIdx.x) * kSplitThreads + threadIdx.x);
}

}  // namespace peft_ext
