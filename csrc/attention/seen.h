// Functions that find which queries may see a key, that write the bias to the scores and that draw dropout, and a
// product that leaves out invisible blocks of keys. Include this file after the headers that attention/kernels_impl.h
// lists.
#pragma once

#include "attention/operands.h"
#include "cpu/philox_impl.h"

namespace peft_ext {
namespace {

// Returns one bit for each query from `query` on, which tells whether the query may see the key. Bits beyond the
// `count` queries are 0.
inline uint64_t seen(const Attention& work, const uint64_t* mask, int64_t key, int64_t query, int64_t count) {
  uint64_t bits = mask ? mask[query / kMaskBits * work.keys + key] : ~uint64_t{0};
  if (count < kMaskBits) bits &= (uint64_t{1} << count) - 1;
  const int64_t after = key - query;
  if (!work.causal || after <= 0) return bits;
  return after >= kMaskBits ? 0 : bits & (~uint64_t{0} << after);
}

inline const uint64_t* mask_of(const Attention& work, int64_t batch, int64_t head) {
  return work.mask ? work.mask + batch * work.mask_batch + head * work.mask_head : nullptr;
}

// Sets the scores [keys, 64] of a block to the transposed bias divided by the scale, and returns true. Without a bias,
// returns false and sets nothing. `rows` is scratch memory for 64 queries by `keys` keys.
inline bool begin_scores(const Attention& work, int64_t batch, int64_t head, int64_t query, int64_t count, int64_t key,
                         int64_t keys, float* rows, float* s) {
  if (work.bias == nullptr) return false;
  const int64_t at = batch * work.bias_batch + head * work.bias_head + query * work.bias_query + key * work.bias_key;
  // A finite bias must stay finite after the division: some callers give a mask as a large negative bias. Divided by a
  // small scale, a large negative bias would become -inf, which hides the key.
  constexpr float kLeast = -2.5e38f;
  const float factor = 1.0f / work.scale;
  with_dtype(work.bias_dtype, [&](auto zero) {
    const auto* bias = static_cast<const decltype(zero)*>(work.bias) + at;
    for (int64_t i = 0; i < count; ++i) {
      const auto* from = bias + i * work.bias_query;
      float* to = rows + i * keys;
      if (work.bias_key == 1)
        for_vectors(keys, [&](auto lanes, int64_t j) {
          const Vec value = lanes.load(from + j), over = Vec::mul(value, Vec::broadcast(factor));
          // `finite` is NaN if value is -inf or NaN, else inf
          const Vec finite = Vec::add(value, Vec::broadcast(INFINITY));
          lanes.store(to + j, Vec::positive(finite, Vec::max(over, Vec::broadcast(kLeast)), over));
        });
      else
        for (int64_t j = 0; j < keys; ++j) {
          const float value = to_float(from[j * work.bias_key]), over = value * factor;
          to[j] = value > -INFINITY && over < kLeast ? kLeast : over;
        }
    }
  });
  transpose_words(rows, keys * static_cast<int64_t>(sizeof(float)), count, keys, s, kQueries);
  return true;
}

// Computes `keeps` as kept() describes, if dropout is active. The function is not inlined, because its loops would take
// registers from its callers.
[[gnu::noinline]] inline void draw_kept(const Attention& work, int64_t batch, int64_t head, int64_t key, int64_t keys,
                                        int64_t query, int64_t count, const uint64_t* bits, uint64_t* keeps) {
  // The draws of a key for 64 queries are in at most kBlocks counter blocks of Philox, which have eight draws each. The
  // counter blocks of kTogether keys are computed together, so that few vector lanes are unused.
  constexpr int64_t kTogether = 16, kBlocks = kMaskBits / kDrawsPerBlock + 1;
  static_assert(kTogether * kBlocks % kPhiloxBlocks == 0, "the list of counter blocks must hold whole groups");
  const uint64_t flat = static_cast<uint64_t>((batch * work.heads + head) * work.keys);
  for (int64_t r0 = 0; r0 < keys; r0 += kTogether) {
    const int64_t here = min_i64(kTogether, keys - r0);
    uint64_t blocks[kTogether * kBlocks];
    alignas(64) uint16_t draws[kTogether * kBlocks * kDrawsPerBlock];
    int64_t starts[kTogether], listed = 0;
    for (int64_t r = 0; r < here; ++r) {
      if (bits[r0 + r] == 0) continue;
      const uint64_t first = (flat + static_cast<uint64_t>(key + r0 + r)) * static_cast<uint64_t>(work.queries) +
                             static_cast<uint64_t>(query);
      const uint64_t end = (first + static_cast<uint64_t>(count) + kDrawsPerBlock - 1) / kDrawsPerBlock;
      starts[r] = listed * kDrawsPerBlock + static_cast<int64_t>(first % kDrawsPerBlock);
      for (uint64_t block = first / kDrawsPerBlock; block < end; ++block) blocks[listed++] = block;
    }
    while (listed % kPhiloxBlocks != 0) blocks[listed++] = 0;
    philox_listed_blocks(work.dropout, blocks, listed, draws);
    for (int64_t r = 0; r < here; ++r) {
      uint32_t words[kMaskBits / 32] = {};
      if (bits[r0 + r] != 0) keep_bits(work.dropout, draws + starts[r], count, words);
      keeps[r0 + r] = words[0] | static_cast<uint64_t>(words[1]) << 32;
    }
  }
}

// Computes, for each of the keys from `key` on, one bit for each query from `query` on: whether dropout keeps the key
// for the query. If dropout is off, all bits of `keeps` are 1. If dropout is on, nothing is drawn for a key that no
// query may see (bits[r] is 0), and the key's bits are 0.
inline void kept(const Attention& work, int64_t batch, int64_t head, int64_t key, int64_t keys, int64_t query,
                 int64_t count, const uint64_t* bits, uint64_t* keeps) {
  if (work.dropout.active) return draw_kept(work, batch, head, key, keys, query, count, bits, keeps);
  for (int64_t r = 0; r < keys; ++r) keeps[r] = ~uint64_t{0};
}

inline bool all_see(uint64_t bits) { return bits == ~uint64_t{0}; }
inline bool any_sees(const uint64_t* bits, int64_t rows) {
  uint64_t any = 0;
  for (int64_t r = 0; r < rows; ++r) any |= bits[r];
  return any != 0;
}
inline uint32_t bits_at(uint64_t bits, int64_t vec) { return static_cast<uint32_t>(bits >> (vec * kWidth)); }

// Returns the number of keys that `causal` lets the queries [query, query + count) see; the mask may hide some of these
// keys.
inline int64_t keys_until(const Attention& work, int64_t query, int64_t count) {
  return work.causal ? min_i64(work.keys, query + count) : work.keys;
}

// Returns the index of the first vector of queries in which `causal` lets a query see the key; the mask is not tested.
inline int64_t first_vec(const Attention& work, int64_t key, int64_t query) {
  return work.causal && key > query ? (key - query) / kWidth : 0;
}

// Computes c [rows, vecs vectors of queries] = left [rows, keys] right [keys, vecs vectors], or c += left right if
// `add`. With `causal`, if some keys come after the first 32 queries of the block, the product of each group of 32
// queries is computed separately, without the keys that no query of the group may see.
inline void multiply_seen(const Attention& work, int64_t key, int64_t count, int64_t query, int64_t rows, int64_t vecs,
                          const Left& left, const Element* right, float* c, bool add) {
  constexpr int64_t kTogether = kQueries / 2 / kWidth;
  const bool diagonal = work.causal && key + count > query + kTogether * kWidth;
  const int64_t together = diagonal ? kTogether : vecs;
  for (int64_t v = 0; v < vecs; v += together) {
    const int64_t here = min_i64(together, vecs - v);
    const int64_t until = keys_until(work, query, (v + here) * kWidth);
    if (until <= key && add) continue;
    multiply(rows, here, left.part(0, key), right + v * kWidth * kWord, kQueries * kWord,
             words_of_depth(until <= key ? 0 : min_i64(count, until - key)), c + v * kWidth, kQueries, add);
  }
}

}  // namespace
}  // namespace peft_ext
