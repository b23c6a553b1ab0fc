// column_reduce_kernel is the second kernel of column_pass. column_reduce_kernel adds the partial sums of all chunks of
// rows, in order.
#pragma once

#include "linear/cuda/columns.cuh"

namespace peft_ext {

// out[c] = sum of partial[chunk][c] over all chunks. Grid: ceil(columns / kColumnThreads) thread blocks.
static __global__ void __launch_bounds__(kColumnThreads)
    column_reduce_kernel(const float* partial, int64_t chunks, int64_t columns, float* out) {
  PEFT_EXT_KERNEL;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x;
  if (column >= columns) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * columns + column];
  out[column] = sum;
}

}  // namespace peft_ext
