// Sums over tokens on all threads: made per chunk of tokens, whose number depends on T alone, and then added in order.
#pragma once

#include <algorithm>

#include "linear/cpu/packing.h"
#include "linear/cpu/pass_plan.h"

namespace peft_ext {

// run(first token, last token, sums) for each chunk into zeroed sums [size]; returns their total, added in order.
template <typename Run>
Tensor sum_chunks(int64_t tokens, int64_t size, const Run& run) {
  if (tokens == 0) return zeros({size});
  const int64_t chunk = chunk_tokens(tokens), chunks = ceil_div(tokens, chunk);
  Tensor sums = empty({chunks, size}, ScalarType::Float);
  float* data = sums.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      std::fill_n(data + c * size, size, 0.0f);
      run(c * chunk, min_i64((c + 1) * chunk, tokens), data + c * size);
    }
  });
  torch::stable::parallel_for(0, size, kPackGrain, [&](int64_t begin, int64_t end) {
    for (int64_t c = 1; c < chunks; ++c)
      for (int64_t i = begin; i < end; ++i) data[i] += data[c * size + i];
  });
  return torch::stable::select(sums, 0, 0);
}

}  // namespace peft_ext
