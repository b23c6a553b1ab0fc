// Counter-based dropout on the device, with the draws of common/philox.h, so that a mask has equal bits on every
// device. A kernel gets the seed in its arguments, or reads the seed from device memory, where a captured CUDA graph
// finds a new seed at each replay. In both cases the host does not wait for the GPU.
#pragma once

#include "cuda/ptx.cuh"

namespace peft_ext {

// Parameters of dropout for a kernel, as Dropout of common/philox.h. The seed and the offset are four words, the lower
// word of each number first: in device memory at `in_memory`, or, if `in_memory` is null, in `words`.
struct DeviceDropout {
  bool active = false;
  const uint32_t* in_memory = nullptr;
  uint32_t words[4] = {};  // with two numbers of 64 bits in place of the four words, a kernel would spill registers
  uint32_t threshold = 0;  // an element whose draw is below the threshold is dropped
  float scale = 1.0f;      // factor of the elements that dropout keeps
};

constexpr int kPhiloxRounds = 7;
constexpr int kPhiloxGroup = 8;  // number of elements whose draws come from one Philox counter

// The state of a dropout whose seed a kernel has read. An element is kept if its 16-bit draw is at least the
// threshold t. kept_halves compares both draws of a word at once: `lower` holds the lower 15 bits of t in both halves,
// and `either` is all ones if t is below 2^15.
struct Philox {
  uint32_t key0, key1, offset0, offset1, lower, either;
};

// Reads the seed of `dropout` and adds `later` to the offset. Without dropout, all fields of the result are 0.
__device__ __forceinline__ Philox load_philox(const DeviceDropout& dropout, uint64_t later = 0) {
  if (!dropout.active) return Philox{};
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = dropout.words[i];
  if (dropout.in_memory != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = dropout.in_memory[i];
  }
  const uint64_t offset = (static_cast<uint64_t>(words[3]) << 32 | words[2]) + later;
  // A threshold of 2^16 drops every element: the lower 15 bits of a draw never reach the value 2^15 of `lower`.
  const uint32_t lower = dropout.threshold > 0xffffu ? 0x8000u : dropout.threshold & 0x7fffu;
  return Philox{words[0],
                words[1],
                static_cast<uint32_t>(offset),
                static_cast<uint32_t>(offset >> 32),
                lower * 0x10001u,
                dropout.threshold < 0x8000u ? 0xffffffffu : 0u};
}

// Returns the draws of the eight flat elements from 8 · group on, two per word, the first in the low half.
__device__ __forceinline__ uint4 draws_of_group(const Philox& philox, uint64_t group) {
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
  uint32_t c2 = philox.offset0, c3 = philox.offset1, k0 = philox.key0, k1 = philox.key1;
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    uint32_t low0, high0, low1, high1;
    mul_wide(c0, 0xD2511F53u, low0, high0);
    mul_wide(c2, 0xCD9E8D57u, low1, high1);
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// Bits 15 and 31 of the result tell whether dropout keeps the elements of the draws in the low half and in the high
// half of `draws`. All other bits of the result have no meaning. 2^15 + (lower 15 bits of the draw) - (lower 15 bits of
// t) has bit 15 if the lower 15 bits of the draw are at least those of t, and the subtraction never borrows from the
// half above. If t is below 2^15, the element is kept if bit 15 of this difference of the lower bits or bit 15 of the
// draw is set; for a larger t, both bits must be set. A bit of the result is set if the bit is set in at least two of
// `reached`, the draws and `either`.
__device__ __forceinline__ uint32_t kept_halves(const Philox& philox, uint32_t draws) {
  const uint32_t reached = (draws | 0x80008000u) - philox.lower;
  return (draws & reached) | ((draws | reached) & philox.either);
}

// Returns kept_halves of each of the four words that hold the eight draws of a group.
__device__ __forceinline__ uint4 kept_of_words(const Philox& philox, uint64_t group) {
  const uint4 draws = draws_of_group(philox, group);
  return make_uint4(kept_halves(philox, draws.x), kept_halves(philox, draws.y), kept_halves(philox, draws.z),
                    kept_halves(philox, draws.w));
}

// Bit i (0 to 7) of the result tells whether dropout keeps flat element 8 · group + i.
__device__ __forceinline__ uint32_t kept_of_group(const Philox& philox, uint64_t group) {
  const uint4 words = kept_of_words(philox, group);
  const uint32_t halves[4] = {words.x, words.y, words.z, words.w};
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) kept |= (halves[i] >> 15 & 1u) << (2 * i) | (halves[i] >> 31) << (2 * i + 1);
  return kept;
}

}  // namespace peft_ext
