// Packs a bool mask into 64-bit words; a word has one bit for each of 64 queries and one key (attention/kernels.h).
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/dtype.h"

namespace peft_ext {

// Byte i of the result is 1 if byte i of `x` is not 0, else 0.
inline uint64_t nonzero_bytes(uint64_t x) {
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7full;
  return (((x & kLow) + kLow) | x) >> 7 & 0x0101010101010101ull;
}

// Packs the mask of up to 64 queries: bit i of words[j] tells whether query i may see key j. Element [i, j] of the mask
// is rows[i * of_query + j * of_key].
inline void pack_mask_block(const uint8_t* rows, int64_t of_query, int64_t of_key, int64_t count, int64_t keys,
                            uint64_t* words) {
  constexpr int64_t kSide = 8;
  // The loop packs eight keys at a time: byte k of bits[g] has the bits of the queries 8 g to 8 g + 7 for key j + k.
  for (int64_t j = 0; j < keys; j += kSide) {
    const int64_t wide = min_i64(kSide, keys - j);
    uint64_t bits[kSide] = {};
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* from = rows + i * of_query + j * of_key;
      uint8_t bytes[kSide] = {};
      if (of_key == 1 && wide == kSide)
        memcpy(bytes, from, kSide);
      else
        for (int64_t k = 0; k < wide; ++k) bytes[k] = from[k * of_key];
      uint64_t row;
      memcpy(&row, bytes, kSide);
      bits[i / kSide] |= nonzero_bytes(row) << i % kSide;
    }
    for (int64_t k = 0; k < wide; ++k) {
      uint64_t word = 0;
      for (int64_t g = 0; g < kSide; ++g) word |= (bits[g] >> (8 * k) & 0xff) << (8 * g);
      words[j + k] = word;
    }
  }
}

}  // namespace peft_ext
