// Finds which queries may see a key, and multiplies only the visible blocks. Include this file after the target pragma
// and the path's Vec, words and transposition.
#pragma once

#include "attention/operands.h"
#include "cpu/philox_impl.h"

namespace peft_ext {
namespace {

// Returns one bit for each query from `query` on: whether the query may see the key. Bits beyond the `count` queries
// are 0.
inline uint64_t seen(const Attention& work, const uint64_t* mask, int64_t key, int64_t query, int64_t count) {
  uint64_t bits = mask ? mask[key * work.mask_key + query / kMaskBits] : ~uint64_t{0};
  if (count < kMaskBits) bits &= (uint64_t{1} << count) - 1;
  const int64_t after = key - query;
  if (!work.causal || after <= 0) return bits;
  return after >= kMaskBits ? 0 : bits & (~uint64_t{0} << after);
}

inline const uint64_t* mask_of(const Attention& work, int64_t batch, int64_t head) {
  return work.mask ? work.mask + batch * work.mask_batch + head * work.mask_head : nullptr;
}

// Sets the scores [keys, 64] of a block to the transposed bias / scale. Without a bias the function returns false and
// sets nothing. `rows` is scratch memory for 64 queries by `keys` keys.
inline bool begin_scores(const Attention& work, int64_t batch, int64_t head, int64_t query, int64_t count, int64_t key,
                         int64_t keys, float* rows, float* s) {
  if (work.bias == nullptr) return false;
  const int64_t at = batch * work.bias_batch + head * work.bias_head + query * work.bias_query + key * work.bias_key;
  // A finite bias must stay finite: some masks are a large negative bias. Divided by a small scale, such a bias would
  // become -inf, which hides the key.
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
          const Vec finite = Vec::add(value, Vec::broadcast(INFINITY));  // inf unless value is -inf or NaN
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

// Returns one bit for each query from `query` on: whether dropout keeps the key for the query. Without dropout all bits
// are 1.
inline uint64_t kept(const Attention& work, int64_t batch, int64_t head, int64_t key, int64_t query, int64_t count) {
  if (!work.dropout.active) return ~uint64_t{0};
  const int64_t first = ((batch * work.heads + head) * work.keys + key) * work.queries + query;
  alignas(64) uint16_t buffer[draws_room(kMaskBits)];
  uint32_t words[kMaskBits / 32 + 1] = {};
  keep_bits(work.dropout, philox_draws(work.dropout, first, count, buffer), count, words);
  return words[0] | static_cast<uint64_t>(words[1]) << 32;
}

inline bool all_see(uint64_t bits) { return bits == ~uint64_t{0}; }
inline bool any_sees(const uint64_t* bits, int64_t rows) {
  uint64_t any = 0;
  for (int64_t r = 0; r < rows; ++r) any |= bits[r];
  return any != 0;
}
inline uint32_t bits_at(uint64_t bits, int64_t vec) { return static_cast<uint32_t>(bits >> (vec * kWidth)); }

// Returns an upper bound of the number of keys that the queries of the block may see. The bound considers `causal`, not
// the mask.
inline int64_t keys_until(const Attention& work, int64_t query, int64_t count) {
  return work.causal ? min_i64(work.keys, query + count) : work.keys;
}

// Returns the index of the first vector of queries in which a query may see the key. The function considers `causal`,
// not the mask.
inline int64_t first_vec(const Attention& work, int64_t key, int64_t query) {
  return work.causal && key > query ? (key - query) / kWidth : 0;
}

// Computes c [rows, vecs vectors of queries] = left [rows, keys] right [keys, vecs vectors], or c += left right if
// `add`. With `causal`, a block with keys after its first 32 queries is multiplied in groups of 32 queries, and each
// group leaves out the keys that none of its queries may see.
inline void multiply_seen(const Attention& work, int64_t key, int64_t count, int64_t query, int64_t rows, int64_t vecs,
                          const Rows& left, const Element* right, float* c, bool add) {
  constexpr int64_t kTogether = kQueries / 2 / kWidth;
  const bool diagonal = work.causal && key + count > query + kTogether * kWidth;
  const int64_t together = diagonal ? kTogether : vecs;
  for (int64_t v = 0; v < vecs; v += together) {
    const int64_t here = min_i64(together, vecs - v);
    const int64_t until = keys_until(work, query, (v + here) * kWidth);
    if (until <= key && add) continue;
    multiply(rows, here, left.data + key, left.stride, right + v * kWidth * kWord, kQueries * kWord,
             words_of_depth(until <= key ? 0 : min_i64(count, until - key)), c + v * kWidth, kQueries, add);
  }
}

}  // namespace
}  // namespace peft_ext
