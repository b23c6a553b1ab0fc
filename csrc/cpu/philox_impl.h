// Computes Philox draws with the vector type Lanes (cpu/simd_<isa>.h). Include this file after the target pragma
// (cpu/target_<isa>.h).
//
// A 64-bit lane holds one 32-bit word of Philox in its lower half, so that a round is two widening products, two shifts
// and two xors. The upper half holds bits without meaning, which the widening products ignore. Two independent sets of
// counters are computed in turn, to hide the latency of the multiplications.
#pragma once

#include "common/philox.h"

namespace peft_ext {
namespace {

constexpr int kPhiloxRounds = 7;
constexpr int kPhiloxSets = 2;
constexpr int kPhiloxBlocks = kPhiloxSets * Lanes::kWidth;  // number of counter blocks computed at a time
constexpr int kDrawsPerBlock = 8;

// Writes the 16-bit draws of kPhiloxBlocks counter blocks to `out`. counters(s) returns the Philox counters of set s.
template <typename Counters>
inline void philox_rounds(const Dropout& dropout, const Counters& counters, uint16_t* out) {
  Lanes c0[kPhiloxSets], c1[kPhiloxSets], c2[kPhiloxSets], c3[kPhiloxSets];
  for (int s = 0; s < kPhiloxSets; ++s) {
    c0[s] = counters(s);
    c1[s] = c0[s].high();
    c2[s] = Lanes::broadcast(dropout.offset);
    c3[s] = c2[s].high();
  }
  const Lanes multiplier0 = Lanes::broadcast(0xD2511F53u), multiplier1 = Lanes::broadcast(0xCD9E8D57u);
  uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Lanes key0 = Lanes::broadcast(k0), key1 = Lanes::broadcast(k1);
    for (int s = 0; s < kPhiloxSets; ++s) {
      const Lanes product0 = Lanes::mul32(c0[s], multiplier0), product1 = Lanes::mul32(c2[s], multiplier1);
      c0[s] = Lanes::xor3(product1.high(), c1[s], key0);
      c2[s] = Lanes::xor3(product0.high(), c3[s], key1);
      c1[s] = product1;
      c3[s] = product0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int s = 0; s < kPhiloxSets; ++s)
    Lanes::store_words(c0[s], c1[s], c2[s], c3[s], out + s * Lanes::kWidth * kDrawsPerBlock);
}

// Writes the draws of the Philox counter blocks [first, first + kPhiloxBlocks), in the order of the elements.
inline void philox_blocks(const Dropout& dropout, uint64_t first, uint16_t* out) {
  philox_rounds(dropout, [&](int s) { return Lanes::counters(first + static_cast<uint64_t>(s * Lanes::kWidth)); }, out);
}

// Writes the draws of the `count` Philox counter blocks whose numbers are in `blocks`. `count` must be a multiple of
// kPhiloxBlocks.
inline void philox_listed_blocks(const Dropout& dropout, const uint64_t* blocks, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; i += kPhiloxBlocks)
    philox_rounds(
        dropout, [&](int s) { return Lanes::listed(blocks + i + s * Lanes::kWidth); }, out + i * kDrawsPerBlock);
}

// Returns the number of draws for which philox_draws needs memory: philox_draws computes whole groups of kPhiloxBlocks
// counter blocks, and the first element may lie within a counter block.
constexpr int64_t draws_room(int64_t count) { return count + (kPhiloxBlocks + 1) * kDrawsPerBlock; }

// Computes the dropout draws of the flat elements [first, first + count) in `buffer`, which has the size
// draws_room(count). Returns the address of the first element's draw.
inline const uint16_t* philox_draws(const Dropout& dropout, int64_t first, int64_t count, uint16_t* buffer) {
  const int64_t block = first / kDrawsPerBlock;
  const int64_t blocks = ceil_div(first + count, kDrawsPerBlock) - block;
  for (int64_t done = 0; done < blocks; done += kPhiloxBlocks)
    philox_blocks(dropout, static_cast<uint64_t>(block + done), buffer + done * kDrawsPerBlock);
  return buffer + first % kDrawsPerBlock;
}

// Sets out[i] to x[i] if dropout keeps element i, and to 0 otherwise. Dropout's scale is not applied.
template <typename T>
inline void drop_values(const Dropout& dropout, const uint16_t* draws, int64_t count, const T* x, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = draws[i] >= dropout.threshold ? x[i] : T{};
}

}  // namespace
}  // namespace peft_ext
