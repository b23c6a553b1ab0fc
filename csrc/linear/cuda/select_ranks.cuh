// Several adapters in one batch: their A and B lie side by side as one of rank R = Σ R_g, and of S = x Aᵀ [T, R] each
// token keeps its own adapter's ranks:
//
//   s[t, r] = scaling_g s[t, r] where first_g <= r < first_g + rank_g, 0 elsewhere;   kept[t, r - first_g] = s[t, r]
//
// g the adapter of t's sample. The table comes with the launch, so that no copy from the host waits for the device and
// a CUDA graph holds it. A thread owns one element. Bytes moved: S twice, a percent of the layer's.
#pragma once

#include "cuda/vector.cuh"

namespace peft_ext {

struct RankRange {
  int32_t first, count;  // of ranks; count 0: no adapter
  float scaling;
};

constexpr int kSelectThreads = 256;
constexpr int kSelectSamples = 256;  // of one launch: its arguments are 4 KiB at most

struct SelectRanks {
  float* s;        // [tokens, rank]
  float* kept;     // [tokens, kept_rank], zeros beyond a token's own
  int64_t begin;   // the launch's first token
  int64_t tokens;  // the launch's
  int64_t length;  // of a sample
  int64_t rank, kept_rank;
  RankRange ranges[kSelectSamples];
};
static_assert(sizeof(SelectRanks) <= 4096, "a launch's arguments");

// Grid: ceil(tokens · rank / kSelectThreads).
static __global__ void __launch_bounds__(kSelectThreads) select_ranks_kernel(SelectRanks work) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSelectThreads + threadIdx.x;
  if (i >= work.tokens * work.rank) return;
  const int64_t token = i / work.rank, r = i % work.rank;
  const RankRange range = work.ranges[token / work.length];
  float* s = work.s + (work.begin + token) * work.rank + r;
  float* kept = work.kept + (work.begin + token) * work.kept_rank;
  const bool own = r >= range.first && r < range.first + range.count;
  if (own) kept[r - range.first] = *s;
  if (r >= range.count && r < work.kept_rank) kept[r] = 0.0f;
  *s = own ? *s * range.scaling : 0.0f;
}

}  // namespace peft_ext
