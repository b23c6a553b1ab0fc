// Computes sums over tokens on all threads. A chunk of tokens is summed by one thread, and the chunks' sums are added
// in order. The number of chunks depends only on the number of tokens, so that a sum has the same bits for every number
// of threads.
#pragma once

#include <algorithm>

#include "cpu/threads.h"
#include "linear/cpu/packing.h"
#include "linear/cpu/pass_plan.h"

namespace peft_ext {

// Calls run(first token, end of the tokens, sums) for each chunk of tokens, with zeroed sums [size], and returns the
// total. sum_chunks holds the sums of as many chunks at a time as fit in kMostSums floats, but at least of one chunk
// per thread.
template <typename Run>
Tensor sum_chunks(int64_t tokens, int64_t size, const Run& run) {
  if (tokens == 0) return zeros({size});
  const int64_t chunk = chunk_tokens(tokens), chunks = ceil_div(tokens, chunk);
  const int64_t together = std::min(chunks, std::max(loop_threads(), kMostSums / std::max<int64_t>(size, 1)));
  const Tensor total = empty({size}, ScalarType::Float);
  const Tensor held = empty({chunks > 1 ? together : 0, size}, ScalarType::Float);
  float *out = static_cast<float*>(total.mutable_data_ptr()), *of_chunks = static_cast<float*>(held.mutable_data_ptr());
  for (int64_t start = 0; start < chunks; start += together) {
    const int64_t count = std::min(together, chunks - start);
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* sums = chunks > 1 ? of_chunks + i * size : out;
        std::fill_n(sums, size, 0.0f);
        run((start + i) * chunk, min_i64((start + i + 1) * chunk, tokens), sums);
      }
    });
    if (chunks == 1) break;
    parallel_for(0, size, kPackGrain, [&](int64_t begin, int64_t end) {
      if (start == 0) std::copy(of_chunks + begin, of_chunks + end, out + begin);
      for (int64_t i = start == 0 ? 1 : 0; i < count; ++i)
        for (int64_t j = begin; j < end; ++j) out[j] += of_chunks[i * size + j];
    });
  }
  return total;
}

}  // namespace peft_ext
