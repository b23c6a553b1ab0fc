// Integer codes of 2, 4 or 8 bits in 32-bit words, the lowest bits first: what the formats of integers share.
#pragma once

#include "weight/packed_view.h"

namespace peft_ext {
namespace {

// Returns code i of an array of codes of `bits` bits. `bits` divides 32, so that no code lies in two words.
PEFT_EXT_BOTH int code_at(const void* words, int bits, int64_t i) {
  const uint32_t word = static_cast<const uint32_t*>(words)[i * bits / 32];
  return static_cast<int>(word >> (i * bits % 32) & ((1u << bits) - 1));
}

// Number of words of `count` codes.
PEFT_EXT_BOTH int64_t words_of(int64_t count, int bits) { return (count * bits + 31) / 32; }

// Number of groups of a row's columns.
PEFT_EXT_BOTH int64_t groups_of(const PackedView& w) { return w.group ? (w.columns + w.group - 1) / w.group : 1; }

// Returns the group of a column. `g_idx` has the group of each column, and is null if groups are consecutive columns.
PEFT_EXT_BOTH int64_t group_at(const PackedView& w, const void* g_idx, int64_t column) {
  if (g_idx) return static_cast<const int32_t*>(g_idx)[column];
  return w.group ? column / w.group : 0;
}

// Whether each 32 columns from a multiple of 32 on are of one group.
inline bool one_group_in_32(const PackedView& w, const void* g_idx) { return !g_idx && w.group % 32 == 0; }

// Writes (code - zero) * scale for 32 codes with one zero and one scale.
template <int kBits>
inline void scale_codes(const uint32_t* words, int zero, float scale, float* out) {
  constexpr int kCodes = 32 / kBits;  // codes of a word
  for (int i = 0; i < kBits; ++i)
    for (int j = 0; j < kCodes; ++j)
      out[i * kCodes + j] = static_cast<float>(static_cast<int>(words[i] >> (kBits * j) & ((1u << kBits) - 1)) - zero) *
                            scale;
}

// Writes (code - zero) * scale for 32 codes with a zero and a scale each.
template <int kBits>
inline void scale_codes(const uint32_t* words, const int* zeros, const float* scales, float* out) {
  constexpr int kCodes = 32 / kBits;
  for (int i = 0; i < kBits; ++i)
    for (int j = 0; j < kCodes; ++j) {
      const int c = i * kCodes + j;
      out[c] = static_cast<float>(static_cast<int>(words[i] >> (kBits * j) & ((1u << kBits) - 1)) - zeros[c]) *
               scales[c];
    }
}

template <typename Zeros, typename Scales>
inline void scale_codes(const uint32_t* words, int bits, Zeros zeros, Scales scales, float* out) {
  if (bits == 4) return scale_codes<4>(words, zeros, scales, out);
  if (bits == 8) return scale_codes<8>(words, zeros, scales, out);
  scale_codes<2>(words, zeros, scales, out);
}

}  // namespace
}  // namespace peft_ext
