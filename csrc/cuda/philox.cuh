// Counter-based dropout on the device: the draws of common/philox.h, so a mask has the same bits on every device.
// The seed is read from device memory: nothing waits for it on the host, and a captured graph sees a new one each time.
#pragma once

#include "cuda/ptx.cuh"

namespace peft_ext {

// As a kernel takes it. seed: int64 [2], seed and offset; null where nothing is dropped.
struct DeviceDropout {
  const int64_t* seed = nullptr;
  uint32_t threshold = 0;  // an element whose draw is lower is dropped
  float scale = 1.0f;      // of those that are kept
};

constexpr int kPhiloxRounds = 7;
constexpr int kPhiloxGroup = 8;  // elements that share a counter block

// A dropout whose seed has been read.
struct Philox {
  uint32_t key0, key1, offset0, offset1, threshold;
};

__device__ __forceinline__ Philox load_philox(const DeviceDropout& dropout) {
  if (dropout.seed == nullptr) return Philox{};
  const uint64_t seed = static_cast<uint64_t>(dropout.seed[0]), offset = static_cast<uint64_t>(dropout.seed[1]);
  return Philox{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(offset),
                static_cast<uint32_t>(offset >> 32), dropout.threshold};
}

// The draws of flat elements 8 · group …, two a word, the first in the low half.
__device__ __forceinline__ uint4 draws_of_group(const Philox& philox, uint64_t group) {
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
  uint32_t c2 = philox.offset0, c3 = philox.offset1, k0 = philox.key0, k1 = philox.key1;
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t low0 = c0 * 0xD2511F53u, low1 = c2 * 0xCD9E8D57u;
    const uint32_t high0 = mul_hi(c0, 0xD2511F53u), high1 = mul_hi(c2, 0xCD9E8D57u);
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// Whether a draw keeps its element: draw >= threshold, in the upper half of a word, where it needs no shift and the
// bits below do not matter.
__device__ __forceinline__ bool keeps(const Philox& philox, uint32_t draw_above) {
  return draw_above >= philox.threshold << 16 && philox.threshold <= 0xffffu;
}

// Bit i: whether flat element 8 · group + i is kept.
__device__ __forceinline__ uint32_t kept_of_group(const Philox& philox, uint64_t group) {
  const uint4 draws = draws_of_group(philox, group);
  const uint32_t words[4] = {draws.x, draws.y, draws.z, draws.w};
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    kept |= (keeps(philox, words[i] << 16) ? 1u << (2 * i) : 0u) | (keeps(philox, words[i]) ? 2u << (2 * i) : 0u);
  return kept;
}

// The same as masks over 16-bit elements, two a word.
__device__ __forceinline__ uint4 kept_pairs(const Philox& philox, uint64_t group) {
  const uint4 draws = draws_of_group(philox, group);
  const uint32_t words[4] = {draws.x, draws.y, draws.z, draws.w};
  uint32_t masks[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    masks[i] = (keeps(philox, words[i] << 16) ? 0xffffu : 0u) | (keeps(philox, words[i]) ? 0xffff0000u : 0u);
  return make_uint4(masks[0], masks[1], masks[2], masks[3]);
}

// Whether one flat element is kept; for the few that no whole group serves.
__device__ __forceinline__ bool kept_element(const Philox& philox, uint64_t element) {
  return (kept_of_group(philox, element / kPhiloxGroup) >> (element % kPhiloxGroup)) & 1u;
}

}  // namespace peft_ext
